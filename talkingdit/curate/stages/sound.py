# SPDX-License-Identifier: Apache-2.0
"""The sound: is it speech, how loud, and of how many."""

from __future__ import annotations

import numpy as np

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import ClipFindings, Figures
from talkingdit.detect import speech, voices
from talkingdit.media.sound import SILENCE_PEAK, SPEECH_RATE

QUIET = -120.0  # dBFS, of nothing at all
VOICE_EVERY = 0.2  # seconds between pieces of speech that are compared
OVERLAP = round(voices.SECONDS / VOICE_EVERY)


class SpeechStage:
    """Share of the time in which somebody speaks, and loudness."""

    gpu = False

    def __init__(self, watch: Watch) -> None:
        speech.speech(np.zeros(speech.HOP, np.float32))

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        samples = look.samples
        if len(samples) < speech.HOP or float(np.abs(samples).max()) < SILENCE_PEAK:
            return {"speech.share": 0.0, "speech.loudness": QUIET, "speech.silent": 1}
        found.spoken = speech.spans(speech.speech(samples))
        spoken = sum(end - begin for begin, end in found.spoken)
        loudness = 10 * np.log10(float(np.mean(np.square(samples, dtype=np.float64))) + 1e-12)
        return {
            "speech.share": round(min(1.0, spoken / look.seconds), 4),
            "speech.loudness": round(float(loudness), 1),
            "speech.clipped": round(float(np.mean(np.abs(samples) > 0.999)), 5),
            "speech.covers": round(len(samples) / SPEECH_RATE / look.seconds, 4),
            "speech.silent": 0,
        }


class VoicesStage:
    """How many people speak, by their voices."""

    gpu = False

    def __init__(self, watch: Watch) -> None:
        self._likeness = watch.same_voice
        voices.embed(np.zeros(0, np.float32), [])

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        pieces = voices.embed(look.samples, found.spoken, VOICE_EVERY)
        if not len(pieces):
            return {}
        return {
            "voices.count": voices.count_voices(pieces, self._likeness, OVERLAP),
            "voices.likeness": round(voices.likeness_of_parts(pieces, OVERLAP), 4),
            "voices.pieces": len(pieces),
        }
