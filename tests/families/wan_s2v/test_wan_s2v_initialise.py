# SPDX-License-Identifier: Apache-2.0
"""Wan-S2V models that begin from a video model: what is taken, what is new, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from official import random_transformer
from safetensors.torch import save_file
from torch import Tensor

from talkingdit.checkpoints.names import to_native
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.initialise import initialise_from_video_model
from talkingdit.models import WanS2VModel, load, preset

SIZE: dict[str, Any] = {
    **{"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 24, "text_len": 10},
    **{"audio_dim": 8, "audio_layers": 5, "audio_inject_layers": (0,)},
}


def video_model(channels: int = 16, image: bool = False) -> WanTransformer3DModel:
    """diffusers' own class, whose outputs are also the reference."""
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        text_dim=24,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        image_dim=20 if image else None,
        added_kv_proj_dim=32 if image else None,
    ).eval()


def native_file(folder: Path, channels: int = 16, image: bool = False) -> tuple[Path, dict[str, Tensor]]:
    state = {to_native(name): value for name, value in video_model(channels, image).state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "wan.safetensors")
    return folder, state


def fresh(**changes: Any) -> WanS2VModel:
    return WanS2VModel(**preset("wan_s2v_14b", **SIZE | changes)).eval()


def test_a_new_model_answers_like_the_video_model_it_began_from(tmp_path: Path) -> None:
    video = video_model()
    video.save_pretrained(tmp_path / "transformer")
    model = fresh()
    report = initialise_from_video_model(model, tmp_path)
    assert (report.cut, report.ignored) == ((), ())
    assert len(report.taken) == len(video.state_dict())
    assert "audio_injector.injector.0.q.weight" in report.new
    latents, text = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 10, 24)
    with torch.no_grad():
        wanted = video(latents, torch.tensor([400.0]), text, return_dict=False)[0]
        found = model(latents, torch.tensor([400.0]), WanInputs(text, audio=torch.randn(1, 5, 8, 8)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_history_packer_sees_constant_patches_as_the_patch_embedding_does(tmp_path: Path) -> None:
    model = fresh()
    report = initialise_from_video_model(model, native_file(tmp_path)[0])
    assert len(report.derived) == 6
    flat = torch.randn(1, 16, 1, 1, 1).expand(-1, -1, 19, 16, 16)
    with torch.no_grad():
        packed, patches = model.frame_packer(flat), model.patch_embedding(flat[:, :, :1])
    torch.testing.assert_close(packed, patches[:, :1].expand_as(packed), rtol=1e-4, atol=1e-5)


def test_an_image_to_video_model_gives_all_but_its_image_branch(tmp_path: Path) -> None:
    folder, state = native_file(tmp_path, channels=36, image=True)
    model = fresh()
    report = initialise_from_video_model(model, folder)
    assert report.cut == ("patch_embedding.weight",)
    assert torch.equal(model.patch_embedding.weight, state["patch_embedding.weight"][:, :16])
    assert torch.equal(model.blocks[1].cross_attn.k.weight, state["blocks.1.cross_attn.k.weight"])
    assert "blocks.1.cross_attn.k_img.weight" in report.ignored
    assert any(name.startswith("img_emb.") for name in report.ignored)
    assert set(report.taken) | set(report.cut) | set(report.ignored) == set(state)
    assert "the first channels of patch_embedding.weight" in str(report)


def test_a_preset_begins_from_a_video_model(tmp_path: Path) -> None:
    folder, state = native_file(tmp_path)
    model = load("wan_s2v_14b", config=SIZE, init_from=folder, seed=3)
    assert torch.equal(model.blocks[0].ffn[0].weight, state["blocks.0.ffn.0.weight"])
    with pytest.raises(UserError, match="init_from goes with a preset, this is a checkpoint with weights of its own"):
        load(folder, init_from=folder)


def test_what_cannot_be_begun_from(tmp_path: Path) -> None:
    folder, state = native_file(tmp_path / "video")
    model = fresh(ffn_dim=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"does not fit a Wan video model of this size; it has 6 of another shape"):
        initialise_from_video_model(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    save_file({k: v.contiguous() for k, v in state.items() if k != "blocks.1.norm3.bias"}, folder / "wan.safetensors")
    with pytest.raises(UserError, match=r"it lacks 1 of \d+ weights: blocks\.1\.norm3\.bias"):
        initialise_from_video_model(fresh(), folder)
    random_transformer(**SIZE).save_pretrained(tmp_path / "s2v")
    with pytest.raises(UserError, match="already a Wan-S2V model"):
        initialise_from_video_model(fresh(), tmp_path / "s2v")
    with pytest.raises(UserError, match="no such folder or file"):
        initialise_from_video_model(fresh(), tmp_path / "nothing")
    for expert in ("high_noise_model", "low_noise_model"):
        (tmp_path / "a14b" / expert).mkdir(parents=True)
        (tmp_path / "a14b" / expert / "config.json").write_text(json.dumps({"_class_name": "WanModel"}))
    with pytest.raises(UserError, match="a14b: has high_noise_model and low_noise_model; name one of these folders"):
        initialise_from_video_model(fresh(), tmp_path / "a14b")
