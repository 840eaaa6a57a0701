# SPDX-License-Identifier: Apache-2.0
"""What a preview of a drawn character shows: the mouth measured in all frames, beside that of the voice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from talkingdit.encoders.speech import Sound, pieces
from talkingdit.media.sound import SPEECH_RATE
from talkingdit.pipelines.inputs import Frames

PART_SECONDS = 60  # of the voice that are looked at at once


class MouthCurves:
    """Mouth openings in 0..1, one per frame."""

    def __init__(self) -> None:
        self._openings: list[NDArray[np.float32]] = []

    def add(self, frames: Frames) -> None:
        """Measure the next frames [n, H, W, 3]."""
        from talkingdit.puppets.probe import CLOSED_HEIGHT, OPENING_HEIGHT, measure_height

        self._openings.append(((measure_height(frames) - CLOSED_HEIGHT) / OPENING_HEIGHT).astype(np.float32))

    def curves(self, sound: Sound, fps: float) -> dict[str, NDArray[np.float32]]:
        """What was measured, and what the sound [samples] at 16 kHz says."""
        measured = np.concatenate(self._openings)
        voice = np.concatenate(list(_openings_of(sound, round(fps), len(measured))))
        return {"mouth in the video": measured, "mouth of the voice": voice}


def _openings_of(sound: Sound, fps: int, frames: int) -> Iterator[NDArray[np.float32]]:
    """Mouth openings of a voice, some of its frames at a time: each depends on little more than its own sound."""
    from talkingdit.encoders.log_mel import loudness_gain
    from talkingdit.puppets.visemes import visemes_from_audio

    gain = loudness_gain(pieces(sound))
    part, margin = PART_SECONDS * fps, fps
    for first in range(0, frames, part):
        before, count = min(first, margin), min(part, frames - first)
        begin = (first - before) * SPEECH_RATE // fps  # whole seconds
        end = begin + (before + count + margin) * SPEECH_RATE // fps
        piece = np.asarray(sound[begin:end], dtype=np.float32) * np.float32(gain)
        if len(piece):
            yield visemes_from_audio(piece, fps, before + count).opening[before:]
        else:
            yield np.zeros(count, np.float32)


Curves = MouthCurves
