# SPDX-License-Identifier: Apache-2.0
"""What a clip is recognised by when it comes again: small pictures of its beginning, middle and end, and two curves.

A copy that was encoded anew, made smaller or brighter by a little has nearly the same; `duplicates.py` compares them.
The curves, of loudness and of movement, tell clips apart whose pictures are alike: parts of one shot of somebody who
sits before a camera that stands still.
"""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import ClipFindings, Figures
from talkingdit.media.sound import SPEECH_RATE

SIDE, MOMENTS = 12, (0.02, 0.25, 0.5, 0.75, 0.98)
SPANS = 48  # parts of a clip whose loudness and movement are noted
FLOOR = 1e-6  # of the power that counts as silence


class SignatureStage:
    """Small pictures, and how loud it is and how much moves over time."""

    gpu = False
    version = 2

    def __init__(self, watch: Watch) -> None: ...

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        last = len(look.pictures) - 1
        small = [_small(look.pictures[round(moment * last)]) for moment in MOMENTS]
        return {
            "signature.pictures": base64.b64encode(np.stack(small).tobytes()).decode(),
            "signature.loudness": _loudness(look),
            "signature.movement": _movement(look),
        }


def _small(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    return np.asarray(cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)


def _loudness(look: Look) -> list[float]:
    """Decibels in spans of the clip; [] without sound for all of them."""
    edges = np.round(np.linspace(0, look.seconds * SPEECH_RATE, SPANS + 1)).astype(int)
    if len(look.samples) <= edges[-2]:
        return []
    power = np.add.reduceat(np.square(look.samples[: edges[-1]], dtype=np.float64), edges[:-1]) / np.diff(edges)
    return [round(float(level), 1) for level in 10 * np.log10(power + FLOOR)]


def _movement(look: Look) -> list[float]:
    """Mean change of colour from moment to moment in small pictures, of 255; [] where there are too few."""
    if len(look.pictures) <= SPANS:
        return []
    moments = np.round(np.linspace(0, len(look.pictures) - 1, SPANS + 1)).astype(int)
    small = np.stack([_small(look.pictures[at]) for at in moments]).astype(np.float64)
    return [round(float(change), 2) for change in np.abs(np.diff(small, axis=0)).mean((1, 2, 3))]


def pictures_of(signature: str) -> NDArray[np.uint8]:
    """uint8 [5, 12, 12, 3]."""
    return np.frombuffer(base64.b64decode(signature), np.uint8).reshape(len(MOMENTS), SIDE, SIDE, 3)
