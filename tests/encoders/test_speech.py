# SPDX-License-Identifier: Apache-2.0
"""Long voices: windows give what the whole gives, at the same places, and how far attention makes them differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from official import write_wav2vec
from torch import Tensor

from talkingdit.encoders import speech
from talkingdit.encoders.log_mel import SpeechFeatures, normalise_loudness
from talkingdit.encoders.speech import Level, feature_parts, is_long, windows
from talkingdit.encoders.wav2vec import Wav2VecEncoder, load_speech_encoder
from talkingdit.errors import UserError
from talkingdit.media.sound import SPEECH_RATE

SECONDS = 19  # of the voice


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of six seconds, of which two are shared: four of them in the voice."""
    for name, seconds in (("WHOLE_SECONDS", 6), ("OVERLAP_SECONDS", 2), ("FADE_SECONDS", 1)):
        monkeypatch.setattr(speech, name, seconds)


@pytest.fixture
def voice() -> np.ndarray:
    """Noise whose loudness changes, off zero."""
    rng = np.random.default_rng(3)
    swell = 0.1 + np.sin(np.linspace(0, 40, SECONDS * SPEECH_RATE)) ** 2
    return (0.05 * swell * rng.standard_normal(len(swell)) + 0.02).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech") / "wav2vec2"
    torch.manual_seed(0)
    write_wav2vec(folder, dim=16, layers=4)
    return folder


def joined(encoder: speech.SpeechEncoder, voice: np.ndarray, frames: int, fps: float) -> Tensor:
    parts = list(feature_parts(encoder, voice, frames, fps))
    assert len(parts) > 1
    return torch.cat(parts, dim=2)


def test_windows_cover_a_voice_and_overlap() -> None:
    assert not is_long(6 * SPEECH_RATE)
    assert is_long(6 * SPEECH_RATE + 1)
    assert windows(6 * SPEECH_RATE + 1) == [0, 4]
    assert windows(10 * SPEECH_RATE) == [0, 4]
    assert windows(10 * SPEECH_RATE + 1) == [0, 4, 8]


def test_a_short_voice_is_heard_whole(folder: Path, voice: np.ndarray) -> None:
    encoder = load_speech_encoder(folder)
    (part,) = feature_parts(encoder, voice[: 6 * SPEECH_RATE], 96, 16)
    torch.testing.assert_close(part, encoder.features(voice[: 6 * SPEECH_RATE], 96), rtol=0, atol=0)


@pytest.mark.parametrize("fps", [16, 25, 12.5])
@pytest.mark.parametrize("seconds", [4.75, 8.0, SECONDS, 20.5, 40.0])
def test_windows_of_a_spectrum_are_the_whole(voice: np.ndarray, fps: float, seconds: float) -> None:
    encoder, frames = SpeechFeatures(fps), round(seconds * fps)
    torch.testing.assert_close(
        joined(encoder, voice, frames, fps), encoder.features(voice, frames), rtol=1e-5, atol=1e-5
    )


def without_attention(folder: Path, fps: float) -> Wav2VecEncoder:
    """Its layers look at one place alone, so that nothing but the places of windows can make a difference."""
    encoder = load_speech_encoder(folder, fps=fps)
    for layer in encoder.model.encoder.layers:
        torch.nn.init.zeros_(layer.attention.out_proj.weight)
        torch.nn.init.zeros_(layer.attention.out_proj.bias)
    return encoder


@pytest.mark.parametrize("fps", [16, 25])
def test_windows_have_the_places_of_the_whole(folder: Path, voice: np.ndarray, fps: float) -> None:
    encoder = without_attention(folder, fps)
    frames = round((SECONDS + 1) * fps)
    whole = encoder.features(voice, frames)
    found = joined(encoder, voice, frames, fps)
    assert whole.std() > 0.1
    assert not found[..., -round(fps) :].any()
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)


def test_attention_beyond_the_window_makes_little_difference(folder: Path, voice: np.ndarray) -> None:
    encoder = load_speech_encoder(folder)
    whole, found = encoder.features(voice, 300), joined(encoder, voice, 300, 16)
    # The last of the layers differs most; its input that no attention has changed does not differ.
    error = (found - whole).square().mean(dim=(1, 2)).sqrt() / whole.square().mean(dim=(1, 2)).sqrt()
    assert error[0] < 1e-3
    assert error[-1] < 0.02
    jumps = (found[..., 1:] - found[..., :-1]).square().mean(dim=(0, 1)).sqrt()
    usual = (whole[..., 1:] - whole[..., :-1]).square().mean(dim=(0, 1)).sqrt()
    assert (jumps < 1.1 * usual + 1e-3).all()  # nothing jumps where a window ends


def test_the_level_is_that_of_the_whole_recording(folder: Path, voice: np.ndarray) -> None:
    encoder = load_speech_encoder(folder)
    normal = encoder.extractor(voice, sampling_rate=SPEECH_RATE).input_values[0]
    np.testing.assert_allclose(encoder.level(speech.pieces(voice, 12_345))(voice), normal, rtol=1e-4, atol=1e-5)
    loud = SpeechFeatures(16).level(speech.pieces(voice, 12_345))(voice)
    np.testing.assert_array_equal(loud, normalise_loudness(voice))


class Steps:
    """An encoder of no family, which knows no windows: it counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def features(self, waveform: np.ndarray | Tensor, frames: int) -> Tensor:
        self.asked.append(len(waveform))
        return torch.full((1, 1, frames), float(len(self.asked)))


def test_any_encoder_hears_windows_and_they_fade_into_each_other(voice: np.ndarray) -> None:
    encoder = Steps()
    found = joined(encoder, voice, 19 * 16, 16)[0, 0]
    assert max(encoder.asked) <= 6 * SPEECH_RATE
    assert len(encoder.asked) == 5
    # The first window goes to 4.5 s, and within a second fades into the second.
    assert found[:72].tolist() == [1.0] * 72
    torch.testing.assert_close(found[72:88], 1 + (torch.arange(16) + 0.5) / 16)
    assert found[88:136].tolist() == [2.0] * 48
    assert len(found) == 304
    assert found[-1] == 5


def test_voices_that_cannot_be_used(folder: Path, voice: np.ndarray) -> None:
    broken = voice.copy()
    broken[12 * SPEECH_RATE] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        joined(load_speech_encoder(folder), broken, 300, 16)
    with pytest.raises(UserError, match="must be finite"):
        joined(SpeechFeatures(16), broken, 300, 16)
    with pytest.raises(UserError, match="got silence"):
        joined(SpeechFeatures(16), 0 * voice, 300, 16)


def test_levels() -> None:
    assert Level()(np.array([0.5], np.float32)).tolist() == [0.5]
    assert Level(0.25, 2.0)(np.array([0.5], np.float32)).tolist() == [0.5]
