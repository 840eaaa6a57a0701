# SPDX-License-Identifier: Apache-2.0
"""Whisper features are those of the official program up to 16 s, and go on beyond, where it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from talkingdit.encoders.whisper import WhisperEncoder, around, load_whisper
from talkingdit.errors import UserError


def tiny_config() -> Any:
    from transformers import WhisperConfig

    return WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, decoder_layers=1, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=50, num_mel_bins=80, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import WhisperFeatureExtractor, WhisperModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whisper")
    model = WhisperModel(tiny_config()).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(path)
    WhisperFeatureExtractor().save_pretrained(path)
    return path


def voice(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16_000)) / 16_000
    wave = np.sin(2 * np.pi * (120 + 20 * np.sin(3 * t)) * t) * (0.6 + 0.4 * np.sin(5 * t)) + 0.1 * rng.normal(
        size=len(t)
    )
    return (0.2 * wave).astype(np.float32)


@torch.no_grad()
def as_transformers_says(folder: Path, sound: np.ndarray, frames: int, step: int) -> Tensor:
    """The states of one call of the library, four zeros in front, ten from every `step`-th on."""
    from transformers import WhisperFeatureExtractor, WhisperModel

    model = WhisperModel.from_pretrained(folder).eval()
    mel = WhisperFeatureExtractor.from_pretrained(folder)(
        sound, sampling_rate=16_000, return_tensors="pt"
    ).input_features
    states = torch.stack(model.encoder(mel, output_hidden_states=True).hidden_states, dim=2)[0]
    states = torch.cat([torch.zeros_like(states[:4]), states])
    return torch.stack([states[step * frame : step * frame + 10] for frame in range(frames)])


@pytest.mark.parametrize(("seconds", "fps", "step"), [(3.0, 25.0, 2), (16.0, 25.0, 2), (2.3, 12.5, 4)])
def test_short_voices_are_as_released(folder: Path, seconds: float, fps: float, step: int) -> None:
    sound = voice(seconds)
    heard = int(len(sound) * fps / 16_000)
    found = load_whisper(folder, fps=fps).features(sound, heard + 5)
    expected = as_transformers_says(folder, sound, heard, step)
    assert found.shape == (heard + 5, 10, 3, 16)
    assert torch.allclose(found[:heard], expected, atol=1e-5)
    assert not found[heard:].any()


def test_long_voices_go_on(folder: Path) -> None:
    """At 70 s: windows are three. In the middle of each, features are those of that window alone, and none jumps."""
    encoder = load_whisper(folder)
    sound = voice(70.0)
    states = encoder.states(sound)
    assert states.shape == (3500, 3, 16)
    for begin, inside in ((0, slice(0, 1100)), (1000, slice(350, 1100)), (2000, slice(350, 1500))):
        window = encoder.states(sound[begin * 320 : (begin + 1500) * 320])[inside]
        assert torch.allclose(states[begin + inside.start : begin + inside.start + len(window)], window, atol=1e-5)
    found = encoder.features(sound, 1750)
    assert torch.equal(found[1000], states[1996:2006])
    assert not found[0, :4].any()
    assert torch.equal(found[0, 4:], states[:6])
    steps = states.diff(dim=0).square().mean((1, 2)).sqrt()
    assert steps[1250:1270].max() < 1.5 * steps.quantile(0.99)


def test_states_outside_are_zero() -> None:
    states = torch.randn(6, 2, 3)
    found = around(states, torch.tensor([0, 1]), 25.0)
    assert torch.equal(found[0], torch.cat([torch.zeros(4, 2, 3), states]))
    assert torch.equal(found[1, :8], torch.cat([torch.zeros(2, 2, 3), states]))
    assert not found[1, 8:].any()


def test_refusals_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    encoder = load_whisper(folder)
    with pytest.raises(ValueError, match="must be finite"):
        encoder.features(np.full(16_000, np.nan, np.float32), 25)
    with pytest.raises(ValueError, match=r"must be \[samples\]"):
        encoder.features(np.zeros((16_000, 2), np.float32), 25)
    with pytest.raises(ValueError, match="frames must be at least 1"):
        encoder.features(voice(1.0), 0)
    with pytest.raises(UserError, match="the speech encoder is missing"):
        load_whisper(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"no \*\.safetensors in it"):
        load_whisper(tmp_path)
    assert isinstance(encoder, WhisperEncoder)
