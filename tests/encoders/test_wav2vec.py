# SPDX-License-Identifier: Apache-2.0
"""Speech features of Wan-S2V against a direct calculation, in time, and at the ends of the sound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official import write_wav2vec
from safetensors.torch import load_file
from transformers import Wav2Vec2ForCTC

from talkingdit.encoders.wav2vec import Wav2VecEncoder, frame_indices, load_speech_encoder
from talkingdit.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech") / "wav2vec2"
    torch.manual_seed(0)
    write_wav2vec(folder, dim=16, layers=4)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Wav2VecEncoder:
    return load_speech_encoder(folder)


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    return (0.1 * np.random.default_rng(1).standard_normal(37_123) + 0.05).astype(np.float32)


def direct(folder: Path, sound: np.ndarray, frames: int) -> np.ndarray:
    """The official procedure in numpy: normalised sound, all layers at 30 per second, the nearest to each frame."""
    model = Wav2Vec2ForCTC.from_pretrained(folder).eval()
    normal = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
    with torch.no_grad():
        states = model(torch.from_numpy(normal)[None], output_hidden_states=True).hidden_states
    layers = torch.cat(states).double().numpy()  # [layers, T, dim]
    old = layers.shape[1]
    new = int(old / 50.0 * 30)
    at = np.linspace(0, old - 1, new)  # aligned ends
    resampled = np.stack([[np.interp(at, np.arange(old), column) for column in layer.T] for layer in layers])
    chosen = np.round(np.linspace(0, frames / 16, frames, endpoint=False) * 30).astype(int)
    result = np.zeros((*resampled.shape[:2], frames))
    for f, index in enumerate(chosen):
        if index < new:
            result[:, :, f] = resampled[:, :, index]
    return result


def test_features_are_those_of_the_official_procedure(folder: Path, encoder: Wav2VecEncoder, sound: np.ndarray) -> None:
    wanted = direct(folder, sound, 48)
    found = encoder.features(sound, 48).double().numpy()
    assert found.shape == (5, 16, 48) == (encoder.layers, encoder.audio_dim, 48)
    assert np.abs(found - wanted).max() < 1e-4
    assert wanted[:, :, 36].any()
    assert not wanted[:, :, 37:].any()
    assert not found[:, :, 37:].any()


def test_frames_take_the_nearest_feature_halves_to_even() -> None:
    assert frame_indices(10, 16).tolist() == [0, 2, 4, 6, 8, 9, 11, 13, 15, 17]
    assert frame_indices(5, 30).tolist() == [0, 1, 2, 3, 4]


def test_more_frames_do_not_change_the_first_ones(encoder: Wav2VecEncoder, sound: np.ndarray) -> None:
    whole = encoder(sound)
    assert whole.shape[2] == 37
    torch.testing.assert_close(encoder(sound, 20), whole[:, :, :20], rtol=0, atol=0)


def test_files_of_older_libraries_give_the_same(
    folder: Path, encoder: Wav2VecEncoder, sound: Any, tmp_path: Path
) -> None:
    """The released encoder is a pickle, from before parametrisations, with its processor elsewhere in diffusers."""
    state = load_file(folder / "model.safetensors")
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for new, old in older.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    assert any(name.endswith("weight_g") for name in state)
    (tmp_path / "audio_encoder").mkdir()
    (tmp_path / "audio_processor").mkdir()
    torch.save(state, tmp_path / "audio_encoder" / "pytorch_model.bin")
    shutil.copy(folder / "config.json", tmp_path / "audio_encoder")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "audio_processor")
    found = load_speech_encoder(tmp_path / "audio_encoder")(sound)
    torch.testing.assert_close(found, encoder(sound), rtol=0, atol=0)


def test_half_precision_files_and_models(folder: Path, encoder: Wav2VecEncoder, sound: np.ndarray) -> None:
    # oneDNN 3.12 rounds grouped convolutions of four bf16 channels to nonsense on CPUs with AMX; released ones have 64.
    with torch.backends.mkldnn.flags(enabled=False):
        half = load_speech_encoder(folder, dtype=torch.bfloat16)(sound)
    assert half.dtype == torch.bfloat16
    assert (half.float() - encoder(sound)).abs().mean() < 0.1


def test_sounds_that_cannot_be_used(encoder: Wav2VecEncoder) -> None:
    with pytest.raises(ValueError, match=r"waveform must be \[samples\], got shape \(2, 5000\)"):
        encoder(np.zeros((2, 5000), np.float32))
    with pytest.raises(ValueError, match=r"must last 0\.1 s at least, got 100 samples"):
        encoder(np.zeros(100, np.float32))
    with pytest.raises(ValueError, match="must be finite"):
        encoder(np.full(5000, np.nan, np.float32))
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        encoder(np.zeros(5000, np.float32), 0)
    assert encoder(np.zeros(1600, np.float32), 1).isfinite().all()


def test_files_that_are_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the speech encoder is missing"):
        load_speech_encoder(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="the speech encoder does not load"):
        load_speech_encoder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    deeper = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(UserError, match=r"the speech encoder lacks 16 weights: encoder\.layers\.4\.attention"):
        load_speech_encoder(tmp_path)
