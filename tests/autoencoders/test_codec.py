# SPDX-License-Identifier: Apache-2.0
"""Videos decoded part by part are those that diffusers decodes at once; released files load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from talkingdit.autoencoders.codec import HunyuanCodec, codec, still
from talkingdit.autoencoders.hunyuan import load_hunyuan_vae
from talkingdit.autoencoders.streaming import StreamingDecoder
from talkingdit.errors import UserError

SETTINGS: dict[str, Any] = {
    "block_out_channels": [8, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 16,
    "scaling_factor": 0.476986,
}


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    model = AutoencoderKLHunyuanVideo(**SETTINGS).eval()
    model.tile_sample_min_num_frames, model.tile_sample_stride_num_frames = 16, 12
    return model


@pytest.mark.parametrize("count", [1, 4, 5, 7, 8, 9, 12])
def test_parts_are_the_whole(vae: Any, count: int) -> None:
    latents = torch.randn(1, 16, count, 4, 6, generator=torch.Generator().manual_seed(count))
    whole = vae.decode(latents / 0.476986, return_dict=False)[0].clamp(-1, 1)
    one = codec(vae)
    assert isinstance(one, HunyuanCodec)
    tail, found = None, []
    for part, (first, last) in enumerate(one.parts(count)):
        frames, tail = one.decode(latents, part, tail)
        assert frames.shape[2] == 4 * (last - first) - (3 if part == 0 else 0)
        found.append(frames)
    assert one.parts(count)[-1][1] == count
    assert torch.allclose(torch.cat(found, dim=2), whole, atol=1e-6)


def test_encoding_is_that_of_diffusers(vae: Any) -> None:
    video = still(torch.rand(1, 3, 1, 16, 24) * 2 - 1, 6)
    expected = vae.encode(video).latent_dist.mode() * 0.476986
    assert codec(vae).encode(video).shape == (1, 16, 6, 2, 3)
    assert torch.allclose(codec(vae).encode(video), expected)


def test_the_autoencoder_of_the_drawn_world_decodes_the_same_way() -> None:
    from diffusers import AutoencoderKLWan

    from talkingdit.puppets import MODEL

    vae = AutoencoderKLWan.from_pretrained(MODEL / "vae").eval()
    latents = torch.randn(1, vae.config.z_dim, 19, 4, 4)
    one = codec(vae)
    found = [one.decode(latents, part, None)[0] for part in range(len(one.parts(19)))]
    assert len(found) == 2
    assert torch.equal(torch.cat(found, dim=2), StreamingDecoder(vae)(latents))


def test_released_files_load(vae: Any, tmp_path: Path) -> None:
    released = {k: v for k, v in SETTINGS.items()} | {
        "_class_name": "AutoencoderKLCausal3D",
        "time_compression_ratio": 4,
        "sample_tsize": 64,
        "down_block_types": ["DownEncoderBlockCausal3D"] * 4,
        "up_block_types": ["UpDecoderBlockCausal3D"] * 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(released))
    with pytest.raises(UserError, match=r"pytorch_model\.pt: there is no such file"):
        load_hunyuan_vae(tmp_path)
    torch.save({"state_dict": {f"vae.{k}": v for k, v in vae.state_dict().items()}}, tmp_path / "pytorch_model.pt")
    loaded = load_hunyuan_vae(tmp_path)
    assert loaded.tile_sample_min_num_frames == 64
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in loaded.state_dict().items())
    vae.save_pretrained(tmp_path / "diffusers")
    assert load_hunyuan_vae(tmp_path / "diffusers").config.latent_channels == 16
    (tmp_path / "config.json").write_text(json.dumps({**released, "_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="_class_name must be"):
        load_hunyuan_vae(tmp_path)
