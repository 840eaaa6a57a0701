# SPDX-License-Identifier: Apache-2.0
"""Mouth curves: they follow vowels, energy and silence, are local, and agree with the phones of a known text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

import talkingdit
from talkingdit.encoders.log_mel import SpeechFeatures, normalise_loudness
from talkingdit.errors import UserError
from talkingdit.media.files import SPEECH_RATE
from talkingdit.puppets.visemes import align_phones, visemes_from_audio, visemes_from_transcript

# First three formants in Hz (Peterson and Barney 1952, men).
FORMANTS = {"a": (730, 1090, 2440), "i": (270, 2290, 3010), "u": (300, 870, 2240), "ae": (660, 1720, 2410)}


def vowel(name: str, seconds: float, pitch: float = 120.0) -> np.ndarray:
    """A sung vowel: pulses through three resonances."""
    count = round(seconds * SPEECH_RATE)
    pulses = (np.arange(count) % round(SPEECH_RATE / pitch) == 0).astype(float)
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(2 * count))
    response = (1 - z) / (1 - 0.96 * z)
    for formant, width in zip(FORMANTS[name], (70, 100, 140), strict=True):
        radius = np.exp(-np.pi * width / SPEECH_RATE)
        response = response / (1 - 2 * radius * np.cos(2 * np.pi * formant / SPEECH_RATE) * z + radius**2 * z**2)
    sound = np.fft.irfft(np.fft.rfft(pulses, 2 * count) * response)[:count]
    return (0.1 * sound / np.sqrt(np.mean(sound**2))).astype(np.float32)


@pytest.fixture
def speech() -> np.ndarray:
    assets = Path(talkingdit.__file__).parent / "puppets" / "assets"
    return soundfile.read(assets / "voice.flac", dtype="float32")[0]


def test_open_vowels_open_and_rounded_vowels_narrow() -> None:
    opening, width = {}, {}
    for name in FORMANTS:
        curves = visemes_from_audio(normalise_loudness(vowel(name, 1.0)), 16)
        opening[name], width[name] = curves.opening[4:12].mean(), curves.width[4:12].mean()
    assert opening["a"] > 0.8
    assert min(opening["a"], opening["ae"]) > opening["i"] + 0.3
    assert min(opening["a"], opening["ae"]) > opening["u"] + 0.1
    assert width["i"] > width["ae"] > width["u"]
    assert width["i"] > 0.7
    assert width["u"] < 0.3


def test_silence_is_a_closed_mouth_at_rest_and_hiss_opens_little() -> None:
    vowels = vowel("a", 1.0)
    hiss = np.random.default_rng(0).normal(0, 0.05, SPEECH_RATE)
    hiss = np.diff(np.diff(np.diff(np.diff(hiss)))) / 8  # above 4 kHz
    pause = np.zeros(SPEECH_RATE, np.float32)
    curves = visemes_from_audio(normalise_loudness(np.concatenate([vowels, pause, hiss, pause])), 16)
    assert (curves.opening[18:31] == 0).all()
    np.testing.assert_allclose(curves.width[18:31], 0.5)
    assert curves.opening[36:44].max() < 0.5 * curves.opening[4:12].min()


def test_curves_follow_sound_at_its_own_frame() -> None:
    wave = np.zeros(4 * SPEECH_RATE, np.float32)
    burst = vowel("a", 2 / 16)
    wave[2 * SPEECH_RATE : 2 * SPEECH_RATE + len(burst)] = burst  # frames 32 and 33
    opening = visemes_from_audio(normalise_loudness(wave), 16).opening
    assert opening[[32, 33]].min() > 0.5
    assert opening[[31, 34]].max() < 0.35
    assert (np.delete(opening, [31, 32, 33, 34]) == 0).all()


def test_a_frame_depends_on_no_more_sound_than_its_features() -> None:
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 0.05, 3 * SPEECH_RATE).astype(np.float32)
    changed = wave.copy()
    changed[20_000:20_400] += vowel("a", 0.025, 400)
    features = (SpeechFeatures(16)(wave) != SpeechFeatures(16)(changed))[0].any(dim=0).numpy()
    visemes = visemes_from_audio(wave).opening != visemes_from_audio(changed).opening
    assert visemes.any()
    assert not (visemes & ~features).any()


def test_real_speech_uses_the_range_smoothly(speech: np.ndarray) -> None:
    curves = visemes_from_audio(normalise_loudness(speech), 16)
    assert len(curves) == int(np.ceil(len(speech) / 1000))
    for curve in (curves.opening, curves.width):
        assert curve.dtype == np.float32
        assert curve.min() >= 0
        assert curve.max() <= 1
    assert 0.25 < curves.opening.mean() < 0.5
    assert 0.2 < curves.opening.std() < 0.35
    assert curves.opening.max() > 0.85
    assert np.abs(np.diff(curves.opening)).max() < 0.7


def test_lengths_and_rates() -> None:
    wave = normalise_loudness(vowel("a", 1.0))
    assert len(visemes_from_audio(wave, 25)) == 25
    beyond = visemes_from_audio(wave, 16, frames=30)
    assert len(beyond) == 30
    assert (beyond.opening[17:] == 0).all()


@pytest.mark.parametrize(
    ("wave", "fps", "frames", "said"),
    [
        (np.zeros((2, 5)), 16, None, r"waveform must be \[samples\]"),
        (np.zeros(50), 0, None, "fps must be positive, got 0"),
        (np.zeros(50), 16, 0, "frames must be at least 1, got 0"),
    ],
)
def test_bad_input(wave: np.ndarray, fps: float, frames: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        visemes_from_audio(wave, fps, frames)


def sung_sentence() -> np.ndarray:
    pause = np.zeros(SPEECH_RATE // 4, np.float32)
    return normalise_loudness(np.concatenate([pause, vowel("a", 0.3), vowel("i", 0.3), pause]))


def test_transcript_gives_phones_in_order_and_like_curves() -> None:
    wave = sung_sentence()
    phones = align_phones(wave, "I, I!")
    assert [name for name, _, _ in phones if name != "SIL"] == ["AY", "AY"]
    assert all(start < end for _, start, end in phones)
    assert phones[-1][2] <= len(wave) / SPEECH_RATE + 0.05
    heard, read = visemes_from_audio(wave), visemes_from_transcript(wave, "I, I!")
    assert len(heard) == len(read)
    assert (read.opening[heard.opening == 0] == 0).all()
    assert np.corrcoef(heard.opening, read.opening)[0, 1] > 0.6


def test_transcripts_that_cannot_be_aligned() -> None:
    wave = sung_sentence()
    with pytest.raises(UserError, match="the word 'xyzzyq' of the transcript is not in the pronouncing dictionary"):
        align_phones(wave, "hello xyzzyq")
    with pytest.raises(UserError, match=r"must hold English words, got '\.\.\.'"):
        align_phones(wave, "...")
    with pytest.raises(UserError, match=r"60 words.*could not be aligned with 1.1 s of sound"):
        align_phones(wave, "tomorrow " * 60)
