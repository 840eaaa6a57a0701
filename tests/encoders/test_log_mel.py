# SPDX-License-Identifier: Apache-2.0
"""Speech features: right column, right bin, same numbers every time; loudness that pauses do not change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import talkingdit
from talkingdit.encoders.log_mel import (
    DELTA_STD,
    LOG_MEL_MEAN,
    LOG_MEL_STD,
    MEL_BINS,
    POWER_FLOOR,
    SpeechFeatures,
    mel_filters,
    normalise_loudness,
)
from talkingdit.errors import UserError
from talkingdit.media.files import SPEECH_RATE


@pytest.fixture
def speech() -> np.ndarray:
    assets = Path(talkingdit.__file__).parent / "puppets" / "assets"
    return soundfile.read(assets / "voice.flac", dtype="float32")[0]


def tone(hz: float, seconds: float, level: float = 0.1) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * SPEECH_RATE)) / SPEECH_RATE)).astype(np.float32)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize("hz", [200, 1000, 3000, 6000])
def test_a_tone_lights_the_mel_bin_around_it(hz: int) -> None:
    features = SpeechFeatures(16)(tone(hz, 1.0), 16)
    log_mel = (
        features[0].reshape(8, MEL_BINS, 16) * torch.tensor(LOG_MEL_STD)[:, None] + torch.tensor(LOG_MEL_MEAN)[:, None]
    )
    mel = 2595 * np.log10(1 + np.array([60.0, 7600.0, hz]) / 700)
    expected = round((mel[2] - mel[0]) / (mel[1] - mel[0]) * (MEL_BINS + 1)) - 1
    assert (log_mel[:, :, 4:12].argmax(1) == expected).all()


def test_log_mel_equals_a_float64_spectrum() -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, SPEECH_RATE).astype(np.float32)
    features = SpeechFeatures(16)(wave, 16)
    frame, hop = 5, 3  # hop 3 of the column is hop 4 * 5 - 2 + 3 of the sound
    centre = (4 * frame - 2 + hop) * 250 + 125
    taper = np.hanning(400)
    power = np.abs(np.fft.rfft(wave[centre - 200 : centre + 200].astype(np.float64) * taper, 512)) ** 2
    expected = np.log(POWER_FLOOR + power / (taper**2).sum() @ mel_filters().double().numpy())
    expected = (expected - np.array(LOG_MEL_MEAN)) / np.array(LOG_MEL_STD)
    np.testing.assert_allclose(features[0].reshape(8, MEL_BINS, 16)[hop, :, frame].numpy(), expected, atol=2e-5)


def test_a_click_changes_only_the_columns_that_hear_it() -> None:
    wave = np.zeros(3 * SPEECH_RATE, np.float32)
    quiet = SpeechFeatures(16)(wave, 48)
    wave[24_250] = 0.5  # in the first half of frame 24; half a frame of context lets frame 23 hear it too
    changed = (SpeechFeatures(16)(wave, 48) != quiet).any(dim=1)
    assert changed[0].nonzero().flatten().tolist() == [23, 24]
    assert set(changed[1].nonzero().flatten().tolist()) <= {23, 24, 25}  # differences reach one hop further
    wave[24_250], wave[24_750] = 0.0, 0.5
    assert (SpeechFeatures(16)(wave, 48) != quiet)[0].any(dim=0).nonzero().flatten().tolist() == [24, 25]


def test_the_derivative_is_the_difference_of_neighbouring_hops() -> None:
    ramp = tone(500, 2.0) * np.linspace(0.01, 1, 2 * SPEECH_RATE).astype(np.float32)
    features = SpeechFeatures(16)(ramp, 32)
    level = features[0].reshape(8, MEL_BINS, 32) * torch.tensor(LOG_MEL_STD)[:, None]
    delta = features[1].reshape(8, MEL_BINS, 32)
    difference = level[2:] - level[:-2]
    assert difference.abs().max() > 1
    torch.testing.assert_close(delta[1:-1] * DELTA_STD, difference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fps", [16, 25, 12.5, 30])
def test_columns_follow_the_frame_rate(fps: float) -> None:
    wave = np.zeros(4 * SPEECH_RATE, np.float32)
    wave[2 * SPEECH_RATE : 2 * SPEECH_RATE + 800] = tone(700, 0.05, 0.5)
    features = SpeechFeatures(fps)(wave)
    assert features.shape == (2, 160, int(np.ceil(4 * fps)))
    loudest = int(features[0].mean(0).argmax())
    assert abs(loudest - int(2.02 * fps)) <= 1


def test_sound_outside_is_silence_and_pieces_equal_the_whole() -> None:
    wave = np.random.default_rng(1).normal(0, 0.1, SPEECH_RATE).astype(np.float32)
    extract = SpeechFeatures(16)
    long = extract(wave, 40)
    torch.testing.assert_close(long[:, :, 20:], extract(np.zeros(SPEECH_RATE, np.float32), 20))
    torch.testing.assert_close(long[:, :, :16], extract(wave, 16), rtol=0, atol=0)
    torch.testing.assert_close(extract(torch.from_numpy(wave), 16), extract(wave, 16), rtol=0, atol=0)
    assert torch.isfinite(extract(wave[:10], 3)).all()


def test_features_of_speech_have_about_unit_scale(speech: np.ndarray) -> None:
    features = SpeechFeatures(16)(normalise_loudness(speech))
    assert features.mean(dim=(1, 2)).abs().max() < 0.4
    assert ((features.std(dim=(1, 2)) > 0.6) & (features.std(dim=(1, 2)) < 1.5)).all()


@pytest.mark.parametrize(
    ("waveform", "frames", "said"),
    [
        (np.zeros((2, 100), np.float32), 4, r"waveform must be \[samples\].*got shape \(2, 100\)"),
        (np.zeros(0, np.float32), 4, "not empty"),
        (np.full(100, np.nan, np.float32), 4, "must be finite"),
        (np.zeros(100, np.float32), 0, "frames must be at least 1, got 0"),
    ],
)
def test_bad_input_to_features(waveform: np.ndarray, frames: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SpeechFeatures(16)(waveform, frames)


def test_bad_fps() -> None:
    with pytest.raises(ValueError, match="fps must be positive, got 0"):
        SpeechFeatures(0)


@pytest.mark.parametrize("gain", [0.003, 0.3, 2.0])
def test_loudness_is_the_same_whatever_the_level_and_the_pauses(speech: np.ndarray, gain: float) -> None:
    normal = normalise_loudness(speech)
    np.testing.assert_allclose(normalise_loudness(gain * speech), normal, rtol=1e-4, atol=1e-6)
    paused = np.concatenate([np.zeros(3 * SPEECH_RATE, np.float32), speech, np.zeros(60 * SPEECH_RATE, np.float32)])
    np.testing.assert_allclose(
        normalise_loudness(paused)[3 * SPEECH_RATE :][: len(speech)], normal, rtol=0.02, atol=1e-4
    )


def test_loudness_of_a_tone_is_the_fixed_level() -> None:
    assert abs(20 * np.log10(rms(normalise_loudness(tone(300, 2.0, 0.5)))) + 23) < 0.05


@pytest.mark.parametrize(
    ("waveform", "said"),
    [
        (np.zeros(SPEECH_RATE, np.float32), "must hold sound, got silence"),
        (np.zeros(0, np.float32), "not empty"),
        (np.zeros((1, 10), np.float32), r"must be \[samples\]"),
        (np.full(10, np.inf, np.float32), "must be finite"),
    ],
)
def test_bad_input_to_loudness(waveform: np.ndarray, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        normalise_loudness(waveform)
    assert str(caught.value).count("\n") == 0


def test_features_of_a_recording_do_not_depend_on_its_level(speech: np.ndarray) -> None:
    encoder = SpeechFeatures(16)
    wanted = encoder(normalise_loudness(speech), 16)
    assert torch.equal(encoder.features(speech, 16), wanted)
    torch.testing.assert_close(encoder.features(torch.from_numpy(0.1 * speech), 16), wanted, rtol=1e-3, atol=1e-3)
