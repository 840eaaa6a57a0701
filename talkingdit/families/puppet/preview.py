# SPDX-License-Identifier: Apache-2.0
"""What a preview of a drawn character shows: the mouth measured in all frames, beside that of the voice."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from talkingdit.pipelines.inputs import Frames


class MouthCurves:
    """Mouth openings in 0..1, one per frame."""

    def __init__(self) -> None:
        self._openings: list[NDArray[np.float32]] = []

    def add(self, frames: Frames) -> None:
        """Measure the next frames [n, H, W, 3]."""
        from talkingdit.puppets.probe import CLOSED_HEIGHT, OPENING_HEIGHT, measure_height

        self._openings.append(((measure_height(frames) - CLOSED_HEIGHT) / OPENING_HEIGHT).astype(np.float32))

    def curves(self, sound: NDArray[np.float32], fps: int) -> dict[str, NDArray[np.float32]]:
        """What was measured, and what the sound [samples] at 16 kHz says."""
        from talkingdit.encoders.log_mel import normalise_loudness
        from talkingdit.puppets.visemes import visemes_from_audio

        measured = np.concatenate(self._openings)
        voice = visemes_from_audio(normalise_loudness(sound), fps, len(measured)).opening
        return {"mouth in the video": measured, "mouth of the voice": voice}


Curves = MouthCurves
