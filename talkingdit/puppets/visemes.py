# SPDX-License-Identifier: Apache-2.0
"""What a puppet's mouth does while it hears itself speak: opening and width for every video frame.

Two ways to the same curves. `visemes_from_audio` needs no language: short-time energy opens the mouth, the shape of
the spectrum says how far and how wide. `visemes_from_transcript` aligns the phones of a known English text and takes
the shape from them, the energy still from the sound. Both use fixed thresholds, so the waveform must have been brought
to a fixed loudness (`encoders.log_mel.normalise_loudness`, once per file); the curves are then local functions
of the sound: the frame itself and half a frame on either side, the span that `SpeechFeatures` shows to a model.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from talkingdit.encoders.log_mel import CONTEXT_HOPS, FFT, HOPS_PER_FRAME, WINDOW, hop_windows
from talkingdit.errors import UserError
from talkingdit.media.files import SPEECH_RATE

# Bands in Hz. The voiced band leaves hiss out; its energy in dB (full scale = 0) opens the mouth between two levels.
VOICED = (100.0, 4000.0)
CLOSED_DB, OPEN_DB = -45.0, -21.0
# A high first formant (open vowel) moves energy from the lower of these bands to the upper; in dB, closed and open.
LOW_F1, HIGH_F1 = (100.0, 450.0), (500.0, 1200.0)
F1_CLOSED_DB, F1_OPEN_DB = -24.0, 0.0
# A high second formant (spread lips) does the same here; in dB, rounded and spread.
LOW_F2, HIGH_F2 = (500.0, 1300.0), (1600.0, 3200.0)
F2_ROUND_DB, F2_SPREAD_DB = -20.0, 6.0
LEAST_OPEN = 0.25  # share of the opening that a closed vowel at full energy keeps
REST_WIDTH = 0.5
# How much each of the 8 hops around a frame counts: its own hops most, the neighbours' little.
HOP_WEIGHTS = np.array([0.05, 0.1, 0.15, 0.2, 0.2, 0.15, 0.1, 0.05])

# Phone (ARPAbet) -> opening at full energy, width.
PHONES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("SIL", "B", "M", "P"), (0.0, 0.5)),
    **{
        "AA": (1.0, 0.5),
        "AE": (0.95, 0.75),
        "AH": (0.75, 0.5),
        "AO": (0.9, 0.25),
        "AW": (0.9, 0.35),
        "AY": (0.95, 0.6),
    },
    **{"EH": (0.85, 0.7), "ER": (0.65, 0.35), "EY": (0.7, 0.75), "IH": (0.55, 0.75), "IY": (0.45, 0.9)},
    **{"OW": (0.75, 0.2), "OY": (0.75, 0.3), "UH": (0.5, 0.25), "UW": (0.4, 0.1), "W": (0.3, 0.1), "Y": (0.35, 0.75)},
    **{"HH": (0.5, 0.5), "R": (0.45, 0.35), "L": (0.45, 0.5), "F": (0.15, 0.6), "V": (0.2, 0.6)},
    **dict.fromkeys(("T", "D", "N", "S", "Z"), (0.3, 0.6)),
    **dict.fromkeys(("TH", "DH", "K", "G", "NG"), (0.35, 0.5)),
    **dict.fromkeys(("SH", "ZH", "CH", "JH"), (0.3, 0.2)),
}


@dataclass(frozen=True)
class Visemes:
    """Mouth curves: `opening` and `width`, float32 [frames] each, 0..1. Closed is 0; a mouth at rest is 0.5 wide."""

    opening: np.ndarray
    width: np.ndarray

    def __len__(self) -> int:
        return len(self.opening)


def visemes_from_audio(waveform: np.ndarray, fps: float = 16.0, frames: int | None = None) -> Visemes:
    """Mouth curves from the sound alone, for any language.

    Args:
        waveform: float [samples], 16 kHz mono, after `normalise_loudness`.
        fps: video frames per second; frame f belongs to the sound from f / fps to (f + 1) / fps.
        frames: length of the curves; default: as many frames as begin within the sound.

    Raises:
        ValueError: the waveform is not [samples], or fps or frames is not positive.
    """
    level, opened, spread = _hops(waveform, fps, frames)
    return _per_frame(level * (LEAST_OPEN + (1 - LEAST_OPEN) * opened), level, spread)


def visemes_from_transcript(waveform: np.ndarray, text: str, fps: float = 16.0, frames: int | None = None) -> Visemes:
    """Mouth curves from the phones of a known English text, aligned to the sound with pocketsphinx.

    Args:
        waveform, fps, frames: as in `visemes_from_audio`.
        text: the words spoken, in order; pauses between them are found.

    Raises:
        UserError: pocketsphinx is not installed, a word is not in its dictionary, or the text does not fit the sound.
        ValueError: as `visemes_from_audio`.
    """
    level, _, _ = _hops(waveform, fps, frames)
    times = (np.arange(len(level)) - CONTEXT_HOPS + 0.5) / (HOPS_PER_FRAME * fps)
    opening, width = np.zeros(len(level)), np.full(len(level), REST_WIDTH)
    for phone, start, end in align_phones(waveform, text):
        inside = (times >= start) & (times < end)
        opening[inside], width[inside] = PHONES[phone]
    # Lips are slower than phones: each target reaches into its neighbours.
    lips = np.array([0.25, 0.5, 0.25])
    opening, width = (np.convolve(np.pad(curve, 1, mode="edge"), lips, "valid") for curve in (opening, width))
    return _per_frame(level * opening, level, width)


def align_phones(waveform: np.ndarray, text: str) -> list[tuple[str, float, float]]:
    """Forced alignment: (phone, start, end) in seconds, in order, ``SIL`` for pauses.

    Args:
        waveform: float [samples], 16 kHz mono.
        text: English words; punctuation does not count.

    Raises:
        UserError: as `visemes_from_transcript`.
    """
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise UserError(
            "visemes: aligning a transcript needs the package pocketsphinx, which is not installed"
        ) from None
    words = re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())
    if not words:
        raise UserError(f"visemes: the transcript must hold English words, got {text[:40]!r}")
    # Wide beams: the acoustic model knows neither these speakers nor synthetic voices. The search for a best path
    # through the word lattice may give word times that leave no room for the phones, so it is off.
    decoder = Decoder(lm=None, beam=1e-80, wbeam=1e-60, pbeam=1e-80, bestpath=False, loglevel="FATAL")
    unknown = [word for word in words if decoder.lookup_word(word) is None]
    if unknown:
        raise UserError(f"visemes: the word {unknown[0]!r} of the transcript is not in the pronouncing dictionary")
    # Digital silence has no spectrum: a little noise keeps the pauses decodable.
    samples = np.asarray(waveform, dtype=np.float32)
    samples = samples * min(1.0, 0.9 / max(float(np.abs(samples).max(initial=0.0)), 1e-9))
    noise = np.random.default_rng(0).normal(0.0, 2e-4, len(samples))
    pcm = ((samples + noise) * 32767).astype("<i2").tobytes()

    def decode() -> None:
        decoder.start_utt()
        decoder.process_raw(pcm, full_utt=True)
        decoder.end_utt()

    try:
        decoder.set_align_text(" ".join(words))
        decode()  # words
        if decoder.hyp() is None:
            raise RuntimeError("no path through the words")
        decoder.set_alignment()
        decode()  # phones
        aligned = decoder.get_alignment()
        if aligned is None:
            raise RuntimeError("no path through the phones")
        phones = [phone for word in aligned for phone in word]
    except RuntimeError as error:
        raise UserError(
            f"visemes: the transcript ({len(words)} words, beginning {' '.join(words)[:30]!r}) could not be aligned "
            f"with {len(waveform) / SPEECH_RATE:.1f} s of sound: expected the words spoken in this order ({error})"
        ) from None
    step = 1 / 100  # pocketsphinx counts frames of 10 ms
    return [(p.name if p.name in PHONES else "SIL", p.start * step, (p.start + p.duration) * step) for p in phones]


def _hops(waveform: np.ndarray, fps: float, frames: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Level, openness and spread, each 0..1 [4 frames + 4], of every hop from half a frame before the first frame."""
    samples = np.asarray(waveform, dtype=np.float32)
    if samples.ndim != 1 or not samples.size:
        raise ValueError(f"visemes: waveform must be [samples] and not empty, got shape {samples.shape}")
    if not fps > 0:
        raise ValueError(f"visemes: fps must be positive, got {fps}")
    if frames is None:
        frames = math.ceil(len(samples) * fps / SPEECH_RATE)
    if frames < 1:
        raise ValueError(f"visemes: frames must be at least 1, got {frames}")
    cut = hop_windows(torch.from_numpy(samples), fps, -CONTEXT_HOPS, HOPS_PER_FRAME * frames + 2 * CONTEXT_HOPS)
    taper = np.hanning(WINDOW).astype(np.float32)
    power = np.abs(np.fft.rfft(cut.numpy() * (taper / np.sqrt(np.sum(taper**2))), n=FFT)) ** 2
    frequency = np.arange(FFT // 2 + 1) * SPEECH_RATE / FFT

    def decibels(band: tuple[float, float]) -> np.ndarray:
        inside = (frequency >= band[0]) & (frequency < band[1])
        # Twice the one-sided sum: the mean square of the band. The floor is far below CLOSED_DB.
        return 10 * np.log10(2 * power[:, inside].sum(1) / FFT + 1e-7)

    level = _ramp(decibels(VOICED), CLOSED_DB, OPEN_DB)
    opened = _ramp(decibels(HIGH_F1) - decibels(LOW_F1), F1_CLOSED_DB, F1_OPEN_DB)
    spread = _ramp(decibels(HIGH_F2) - decibels(LOW_F2), F2_ROUND_DB, F2_SPREAD_DB)
    return level, opened, spread


def _ramp(value: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((value - low) / (high - low), 0.0, 1.0)


def _per_frame(opening: np.ndarray, level: np.ndarray, width: np.ndarray) -> Visemes:
    """Weigh the 8 hops around every frame; where there is no sound, the width returns to rest."""
    width = REST_WIDTH + level * (width - REST_WIDTH)
    windows = (
        np.lib.stride_tricks.sliding_window_view(curve, len(HOP_WEIGHTS))[::HOPS_PER_FRAME]
        for curve in (opening, width)
    )
    opened, widths = ((window @ HOP_WEIGHTS).astype(np.float32) for window in windows)
    return Visemes(np.clip(opened, 0, 1), np.clip(widths, 0, 1))
