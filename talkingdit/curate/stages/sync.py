# SPDX-License-Identifier: Apache-2.0
"""Do mouth and voice belong together: `envelope`, the opening of the mouth against the loudness of the voice.

The measure is plain and needs no weights of its own: the correlation of the two curves, at the shift that fits best. It
is not SyncNet's confidence and not comparable with it: that is the slot `syncnet`, in `talking.py`. Of several people
the one who fits best is the speaker.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import ClipFindings, Figures
from talkingdit.media.sound import SPEECH_RATE

LOW, HIGH = 200.0, 4000.0  # Hz, of a voice
FLOOR = 1e-3  # of the amplitude that counts as silence
SLOWEST = 1.5  # seconds: slower changes, as of the head's turn, are taken out
LEAST = 1.0  # seconds that curves must have in common

Curve = NDArray[np.float64]


class SyncStage:
    """Shift and correlation of mouth and voice, and who of several people speaks."""

    gpu = False

    def __init__(self, watch: Watch) -> None:
        self._largest = watch.largest_lag

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        people = [person.opening for person in found.people if person.opening is not None]
        if not people or not found.spoken:
            return {}
        voice = envelope(look.samples, look.fps, len(look.pictures))
        results = [shift(opening.astype(np.float64), voice, look.fps, self._largest) for opening in people]
        best = max(range(len(results)), key=lambda i: results[i][1])
        lag, score, unshifted = results[best]
        return {
            "sync.method": "envelope",
            "sync.lag": round(lag, 3),
            "sync.score": round(score, 3),
            "sync.unshifted": round(unshifted, 3),
            "sync.speaker": best,
            "sync.scores": [round(result[1], 3) for result in results],
        }


def envelope(samples: NDArray[np.float32], fps: float, count: int) -> Curve:
    """How loud a voice is during each picture, on a logarithmic scale: float64 [count]."""
    length = round(count / fps * SPEECH_RATE)
    padded = np.zeros(max(length, 1), np.float64)
    padded[: min(length, len(samples))] = samples[:length]
    spectrum, frequencies = np.fft.rfft(padded), np.fft.rfftfreq(len(padded), 1 / SPEECH_RATE)
    spectrum[(frequencies < LOW) | (frequencies > HIGH)] = 0
    power = np.concatenate([[0.0], np.cumsum(np.fft.irfft(spectrum, len(padded)) ** 2)])
    edges = np.clip(np.round(np.arange(count + 1) / fps * SPEECH_RATE).astype(int), 0, len(padded))
    mean = np.diff(power[edges]) / np.maximum(1, np.diff(edges))
    loud: Curve = np.log10(np.sqrt(np.maximum(mean, 0)) + FLOOR)
    return loud


def shift(mouth: Curve, voice: Curve, fps: float, largest: float) -> tuple[float, float, float]:
    """The seconds by which a mouth is behind the voice, the correlation there, and that without a shift.

    Args:
        mouth, voice: [F] curves.
        fps: of both.
        largest: seconds that are tried, both ways.
    """
    mouth, voice = _quick(mouth, fps), _quick(voice, fps)
    reach = min(int(largest * fps), len(mouth) - max(2, round(LEAST * fps)))
    if reach < 0:
        return 0.0, 0.0, 0.0
    lags = np.arange(-reach, reach + 1)
    values = np.array([_correlation(mouth, voice, int(lag)) for lag in lags])
    best = int(values.argmax())
    return float(lags[best] / fps), float(values[best]), float(values[reach])


def _quick(curve: Curve, fps: float) -> Curve:
    """A curve without its slow part."""
    width = max(3, round(SLOWEST * fps) | 1)
    if len(curve) <= width:
        return curve - curve.mean()
    padded = np.pad(curve, width // 2, mode="reflect")
    slow = np.convolve(padded, np.full(width, 1 / width), "valid")
    return curve - slow


def _correlation(mouth: Curve, voice: Curve, lag: int) -> float:
    a = mouth[max(0, lag) : len(mouth) + min(0, lag)]
    b = voice[max(0, -lag) : len(voice) - max(0, lag)]
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 1e-9 else 0.0
