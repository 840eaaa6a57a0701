# SPDX-License-Identifier: Apache-2.0
"""Whole Wan-S2V checkpoints: the official folder and that of diffusers, and what is missing in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from official import STEM, T5_FILE, VAE_FILE, WAV2VEC, make_official

from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint, WanS2VSettings
from talkingdit.families.wan_s2v.presets import PRESETS
from talkingdit.models import WanInputs, load_checkpoint


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_official(
        tmp_path_factory.mktemp("checkpoints") / "Wan2.2-S2V-14B", num_layers=2, audio_inject_layers=(1,)
    )


@pytest.fixture(scope="module")
def loaded(official: Path) -> WanS2VCheckpoint:
    checkpoint = load_checkpoint(official)
    assert isinstance(checkpoint, WanS2VCheckpoint)
    return checkpoint


@pytest.fixture
def folder(official: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(official, tmp_path / "copy"))


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_every_part_of_the_official_folder(loaded: WanS2VCheckpoint) -> None:
    for part in (loaded.transformer, loaded.vae, loaded.text_encoder, loaded.audio_encoder):
        assert not part.training
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    features, mask = loaded.text_encoder.encode(["a person talks", ""])
    assert features.shape == (2, 4, loaded.transformer.config.text_dim)
    assert mask.tolist() == [[True] * 4, [True, False, False, False]]
    audio = loaded.audio_encoder(np.random.default_rng(0).standard_normal(16000).astype(np.float32), 8)
    with torch.no_grad():
        inputs = WanInputs(features[:1], audio=audio[None])
        velocity = loaded.transformer(torch.randn(1, 16, 2, 4, 4), torch.tensor([5.0]), inputs)
    assert velocity.shape == (1, 16, 2, 4, 4)
    assert velocity.isfinite().all()


def test_half_precision_is_for_the_large_parts(official: Path) -> None:
    checkpoint = load_checkpoint(official, torch.bfloat16)
    assert isinstance(checkpoint, WanS2VCheckpoint)
    assert checkpoint.transformer.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    assert checkpoint.text_encoder.encode(["a"]).features.dtype == torch.bfloat16
    assert checkpoint.vae.dtype == torch.float32
    assert next(checkpoint.audio_encoder.parameters()).dtype == torch.float32


def test_settings_are_the_official_ones_unless_a_file_says_others(loaded: WanS2VCheckpoint, folder: Path) -> None:
    settings = loaded.settings
    assert settings == WanS2VSettings()
    assert (settings.fps, settings.infer_frames, settings.motion_frames, settings.steps) == (16, 80, 73, 40)
    assert (settings.shift, settings.guidance, settings.solver, settings.max_area) == (3.0, 4.5, "unipc", 720896)
    assert settings.motion_frames == PRESETS["wan_s2v_14b"]["motion_frames"][0]
    assert settings.negative_prompt.startswith("画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，")
    assert settings.negative_prompt.endswith("三条腿，背景人很多，倒着走")
    assert len(settings.negative_prompt) == 116
    file = folder / "pipeline.json"
    WanS2VSettings(steps=2, infer_frames=8, solver="dpm++").save(file)
    assert load_checkpoint(folder).settings == WanS2VSettings(steps=2, infer_frames=8, solver="dpm++")
    for change, match in (
        ({"infer_frames": 10}, "infer_frames must be a multiple of 4, got 10"),
        ({"motion_frames": 8}, "motion_frames must be 4 n - 3, got 8"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"shift": 0}, "shift must be a number above 0, got 0"),
        ({"guidance": "much"}, "guidance must be a number of at least 0, got 'much'"),
        ({"solver": "heun"}, r"solver must be one of unipc, dpm\+\+, euler, got 'heun'"),
        ({"size_multiple": 20}, "size_multiple must be a multiple of 16, got 20"),
        ({"speed": 3}, "unknown setting 'speed'; known are drop_first_motion"),
    ):
        file.write_text(json.dumps(change))
        refuse(folder, match)


def test_the_layout_of_diffusers(loaded: WanS2VCheckpoint, official: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    for file in (*official.glob(f"{STEM}*"), official / "config.json"):
        shutil.copy(file, tmp_path / "transformer")
    loaded.vae.save_pretrained(tmp_path / "vae")
    loaded.text_encoder.model.save_pretrained(tmp_path / "text_encoder")
    shutil.copytree(official / "google" / "umt5-xxl", tmp_path / "tokenizer")
    refuse(tmp_path, "not a whole checkpoint, the folder audio_encoder/ is missing in it")
    shutil.copytree(official / WAV2VEC, tmp_path / "audio_encoder")
    (tmp_path / "model_index.json").write_text("{}")
    other = load_checkpoint(tmp_path)
    assert isinstance(other, WanS2VCheckpoint)
    for name in ("transformer", "vae", "text_encoder", "audio_encoder"):
        first, second = getattr(loaded, name).state_dict(), getattr(other, name).state_dict()
        assert list(first) == list(second)
        assert all(torch.equal(first[key], second[key]) for key in first)
    shutil.rmtree(tmp_path / "vae")
    refuse(tmp_path, "not a whole checkpoint, the folder vae/ is missing in it")


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (VAE_FILE, r"Wan2\.1_VAE\.pth, the autoencoder, is missing"),
        (T5_FILE, r"models_t5_umt5-xxl-enc-bf16\.pth, the text encoder, is missing"),
        ("google/umt5-xxl", "google/umt5-xxl/, the tokenizer of the text encoder, is missing"),
        (WAV2VEC, "wav2vec2-large-xlsr-53-english/, the speech encoder, is missing"),
        (f"{STEM}-00002-of-00003.safetensors", f"{STEM}-00002-of-00003.safetensors is missing of the 3 files"),
        ("config.json", r"config\.json: there is no such file; the checkpoint is not complete"),
    ],
)
def test_a_missing_part_is_named(folder: Path, part: str, match: str) -> None:
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refuse(folder, match)


def test_parts_that_do_not_fit_each_other(folder: Path, tmp_path: Path) -> None:
    other = make_official(tmp_path / "other", num_layers=1, audio_inject_layers=(0,), text_dim=16, audio_dim=8)
    shutil.move(folder / WAV2VEC, tmp_path / "speech")
    shutil.copytree(other / WAV2VEC, folder / WAV2VEC)
    refuse(folder, "the transformer has audio_dim 16 but the speech encoder has width 8")
    shutil.rmtree(folder / WAV2VEC)
    shutil.move(tmp_path / "speech", folder / WAV2VEC)
    shutil.copy(other / T5_FILE, folder)
    refuse(folder, "the transformer has text_dim 32 but the text encoder has width 16")
    (folder / "models_t5_other.pth").write_bytes(b"")
    refuse(folder, f"models_t5_other.pth and {T5_FILE} could both be meant")
