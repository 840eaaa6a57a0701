# SPDX-License-Identifier: Apache-2.0
"""Decoding only the end must equal decoding everything with diffusers and cutting, and must cost less."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_checkpoint import make_vae
from torch import Tensor

from talkingdit.autoencoders.tail import decode_after

SHALLOW = {"num_res_blocks": 1, "attn_scales": [], "z_dim": 16, "base_dim": 4}
VAES: dict[str, dict[str, Any]] = {
    "wan 2.1": {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True], **SHALLOW, "num_res_blocks": 2},
    "wan 2.2": {
        **{"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True], "is_residual": True, **SHALLOW},
        **{"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
    },
}


def build(name: str) -> AutoencoderKLWan:
    torch.manual_seed(5)
    vae = make_vae() if name == "puppets" else AutoencoderKLWan(**VAES[name])
    return vae.double().eval()


def whole(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        return vae.decode((latents * std + mean).double()).sample.float()


@pytest.mark.parametrize("name", ["puppets", *VAES])
def test_the_end_equals_the_end_of_the_whole(name: str) -> None:
    vae = build(name)
    latents = torch.randn(1, 16, 22, 2, 2)
    everything = whole(vae, latents)
    for past in (1, 2, 19):
        end = decode_after(vae, latents[:, :, :past], latents[:, :, past:])
        wanted = everything[:, :, -4 * (22 - past) :]
        assert end.shape == wanted.shape
        # Random decoders make faint pictures of slightly different neighbours: compare with their differences.
        scale = wanted.diff(dim=2).std()
        assert (end - wanted).abs().max() < 1e-5 * scale


def test_the_end_depends_on_the_past_as_far_as_the_decoder_sees() -> None:
    """Guards the test above: the context matters, also beyond the warm-up of the last stage."""
    vae = build("wan 2.1")
    latents = torch.randn(1, 16, 21, 2, 2)
    plain = decode_after(vae, latents[:, :, :19], latents[:, :, 19:])
    for changed in (18, 10):
        other = latents.clone()
        other[:, :, changed] += 1.0
        assert (decode_after(vae, other[:, :, :19], other[:, :, 19:]) != plain).any()


def test_late_stages_run_for_few_latents_of_the_past() -> None:
    vae = build("wan 2.1")
    calls: Counter[int] = Counter()
    for number, block in enumerate(vae.decoder.up_blocks):
        block.register_forward_hook(lambda *_, number=number: calls.update([number]))
    latents = torch.randn(1, 16, 39, 2, 2)
    decode_after(vae, latents[:, :, :19], latents[:, :, 19:])
    assert calls == {0: 39, 1: 34, 2: 27, 3: 24}


def test_tiles_are_used_where_the_model_asks_for_them() -> None:
    vae = build("puppets").float()
    latents = torch.randn(1, 16, 3, 8, 8)
    vae.enable_tiling(32, 32, 24, 24)
    tiled = decode_after(vae, latents[:, :, :1], latents[:, :, 1:])
    torch.testing.assert_close(tiled, whole(vae.double(), latents)[:, :, -8:], rtol=1e-4, atol=1e-4)
    vae.use_tiling = False
    plain = decode_after(vae.float(), latents[:, :, :1], latents[:, :, 1:])
    assert tiled.shape == plain.shape
    assert (tiled != plain).any()
