# SPDX-License-Identifier: Apache-2.0
"""What a clip is recognised by when it comes again: small pictures of its beginning, middle and end.

A copy that was encoded anew, made smaller or brighter by a little has nearly the same; `duplicates.py` compares them.
"""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import ClipFindings, Figures

SIDE, MOMENTS = 12, (0.02, 0.25, 0.5, 0.75, 0.98)


class SignatureStage:
    """Small pictures, and a mouth's curve."""

    gpu = False

    def __init__(self, watch: Watch) -> None: ...

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        import cv2

        last = len(look.pictures) - 1
        small = [
            cv2.resize(look.pictures[round(moment * last)], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
            for moment in MOMENTS
        ]
        return {"signature.pictures": base64.b64encode(np.stack(small).tobytes()).decode()}


def pictures_of(signature: str) -> NDArray[np.uint8]:
    """uint8 [5, 12, 12, 3]."""
    return np.frombuffer(base64.b64decode(signature), np.uint8).reshape(len(MOMENTS), SIDE, SIDE, 3)
