# SPDX-License-Identifier: Apache-2.0
"""The bare network of the Wan autoencoder computes what diffusers' class computes: to the last bit, but for float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_checkpoint import make_vae
from torch import Tensor

from talkingdit.autoencoders.latents import patchify, unpatchify
from talkingdit.autoencoders.streaming import StreamingDecoder, encode
from talkingdit.autoencoders.tail import decode_after, lookback
from talkingdit.autoencoders.wan import exchange_layers, load_vae
from talkingdit.autoencoders.wan_network import BareAutoencoderKLWan
from talkingdit.nn.bfloat16 import multiplies_bfloat16

SMALL = {"dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True], "num_res_blocks": 1, "base_dim": 4}


def pair(kind: str, dtype: torch.dtype) -> tuple[AutoencoderKLWan, BareAutoencoderKLWan]:
    """diffusers' autoencoder, and the bare one with its weights."""
    torch.manual_seed(5)
    theirs = make_vae() if kind == "puppets" else AutoencoderKLWan(**SMALL, decoder_base_dim=6)
    for name, parameter in theirs.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    ours = BareAutoencoderKLWan(**{k: v for k, v in theirs.config.items() if not k.startswith("_")})
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype).eval(), ours.to(dtype).eval()


def same(got: Tensor, want: Tensor, network: torch.dtype = torch.float32) -> bool:
    """Up to rounding where convolutions are summed in another order: in float32, and in bfloat16 on processors that do
    not multiply it (its results are some 3 % from those of float32, ours as theirs); else to the last bit."""
    if got.dtype != want.dtype or torch.equal(got, want):
        return torch.equal(got, want)
    near = {torch.float32: 1e-5}
    if not multiplies_bfloat16(torch.device("cpu")):
        near[torch.bfloat16] = 4 * torch.finfo(torch.bfloat16).eps
    return float((got.float() - want.float()).norm() / want.float().norm()) < near.get(network, 0.0)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("puppets", torch.float32), ("puppets", torch.bfloat16), ("wan", torch.float32)]
)
def test_the_same(kind: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(kind, dtype)
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    video = torch.rand(2, 3, 13, 32, 48) * 2 - 1
    latents = encode(theirs, video)
    assert same(encode(ours, video), latents, dtype)
    assert latents.shape == (2, 16, 4, 4, 6)
    streams = StreamingDecoder(theirs), StreamingDecoder(ours)
    for piece in latents.split([1, 2, 1], dim=2):
        want, got = (stream(piece) for stream in streams)
        assert want.std() > 1e-3
        assert same(got, want, dtype)
    assert lookback(ours) == lookback(theirs)
    assert same(decode_after(ours, latents, latents), decode_after(theirs, latents, latents), dtype)


@torch.no_grad()
def test_other_weights_are_taken_up() -> None:
    """In place, as a state dict brings them, and in another dtype and back."""
    _, ours = pair("wan", torch.float32)
    theirs, _ = pair("wan", torch.float32)
    latents = torch.randn(1, 16, 2, 4, 4)
    before = StreamingDecoder(ours)(latents)
    for parameter in theirs.parameters():
        parameter.mul_(1.1)
    ours.load_state_dict(theirs.state_dict())
    want = StreamingDecoder(theirs)(latents)
    assert not same(before, want)
    assert same(StreamingDecoder(ours)(latents), want)
    assert same(StreamingDecoder(ours.double().float())(latents), want)
    with torch.inference_mode():
        assert same(StreamingDecoder(ours)(latents).clone(), want)


def test_whole_videos_of_diffusers_come_out() -> None:
    """Not by our loops over time, but by those of diffusers."""
    theirs, ours = pair("wan", torch.float32)
    mean, std = (torch.tensor(theirs.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    latents = torch.randn(1, 16, 4, 4, 4)
    with torch.no_grad():
        want = theirs.decode(latents * std + mean).sample
    assert same(StreamingDecoder(ours)(latents), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exchanged_layers_have_the_weights_of_those_before(dtype: torch.dtype) -> None:
    """diffusers' class stays: its loops, tiles and saving go on; a weight that is moved or trained is the same one."""
    theirs, ours = pair("wan", dtype)
    theirs.decoder.requires_grad_(False)
    weights = dict(theirs.named_parameters())
    frozen = {name for name, weight in weights.items() if not weight.requires_grad}
    x = torch.randn(1, 16, 3, 4, 6, dtype=dtype)
    with torch.no_grad():
        want, want_tiled = theirs.decode(x).sample, tiled(theirs, x)
        exchange_layers(theirs)
        assert isinstance(theirs.decoder, type(ours.decoder))
        assert same(theirs.decode(x).sample, want, dtype)
        assert same(tiled(theirs, x), want_tiled, dtype)
    assert torch.equal(StreamingDecoder(theirs)(x), StreamingDecoder(ours)(x))
    now = dict(theirs.named_parameters())
    assert now.keys() == weights.keys()
    assert all(now[name] is weights[name] for name in weights)
    assert {name for name, weight in now.items() if not weight.requires_grad} == frozen
    assert not theirs.training


def test_what_is_loaded_for_use_has_our_layers(tmp_path: Path) -> None:
    theirs, ours = pair("wan", torch.float32)
    theirs.save_pretrained(tmp_path)
    loaded = load_vae(tmp_path)
    assert isinstance(loaded, AutoencoderKLWan)
    assert not loaded.training
    latents = torch.randn(1, 16, 2, 4, 4)
    assert torch.equal(StreamingDecoder(loaded)(latents), StreamingDecoder(ours)(latents))
    assert type(loaded.decoder) is type(ours.decoder)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoencoderKLWan.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(StreamingDecoder(again)(latents), StreamingDecoder(theirs)(latents))


def tiled(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decoded in overlapping tiles by diffusers."""
    vae.enable_tiling(16, 16, 8, 8)
    frames = vae.decode(latents).sample
    vae.disable_tiling()
    return frames


def test_layers_with_hooks_are_kept() -> None:
    """A library that moves weights to another device and back has hooks on layers."""
    theirs, _ = pair("wan", torch.float32)
    decoder = theirs.decoder
    handle = decoder.conv_in.register_forward_pre_hook(lambda *_: None)
    exchange_layers(theirs)
    assert theirs.decoder is decoder
    handle.remove()
    exchange_layers(theirs)
    assert theirs.decoder is not decoder


@pytest.mark.parametrize("changed", [{"is_residual": True, "decoder_base_dim": 4}, {"attn_scales": [0.5]}])
def test_other_layers_are_kept(changed: dict[str, Any]) -> None:
    theirs = AutoencoderKLWan(**SMALL | changed)
    decoder = theirs.decoder
    exchange_layers(theirs)
    assert theirs.decoder is decoder


@pytest.mark.parametrize("changed", [{"is_residual": True}, {"attn_scales": [0.5]}, {"dropout": 0.1}])
def test_others_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is_residual, attn_scales and dropout"):
        BareAutoencoderKLWan(**SMALL, **changed)


def test_patches_are_those_of_diffusers() -> None:
    from diffusers.models.autoencoders import autoencoder_kl_wan as theirs

    video = torch.randn(2, 3, 5, 8, 12)
    patches = patchify(video, 2)
    assert torch.equal(patches, theirs.patchify(video, patch_size=2))
    assert torch.equal(unpatchify(patches, 2), theirs.unpatchify(patches, patch_size=2))
    assert torch.equal(unpatchify(patches, 2), video)
