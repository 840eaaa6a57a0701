# SPDX-License-Identifier: Apache-2.0
"""How much moves: optical flow by dense inverse search (arXiv:1603.03590), which OpenCV has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_SIDE, LEAST_SHARE = 16, 0.4  # pixels, and part of the longer side, that the shorter one of a picture needs


def flow_between(search: Any, before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Flow from one grey picture to another: float32 [h, w, 2] in pixels.

    OpenCV reads behind the ends of pictures that are much longer than wide, or smaller than its patches, and may take
    the process down with it; such pictures get more of their last rows and columns first.

    Args:
        search: `cv2.DISOpticalFlow`.
        before, after: uint8 [h, w].
    """
    import cv2

    height, width = before.shape
    least = max(LEAST_SIDE, math.ceil(LEAST_SHARE * max(height, width)))
    down, right = max(0, least - height), max(0, least - width)
    if down or right:
        before, after = (
            np.asarray(cv2.copyMakeBorder(one, 0, down, 0, right, cv2.BORDER_REPLICATE), np.uint8)
            for one in (before, after)
        )
    found: NDArray[np.float32] = np.asarray(search.calc(before, after, None), np.float32)[:height, :width]
    return found


class Flow:
    """Flow between pictures that follow on each other, at a small size."""

    def __init__(self, side: int = 192) -> None:
        import cv2

        self._side = side
        self._search: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)

    def __call__(self, before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.float32]:
        """How far each place moves: float32 [h, w, 2] in parts of the longer side; pictures are uint8 [H, W, 3]."""
        flow = flow_between(self._search, self._grey(before), self._grey(after))
        return flow / max(flow.shape[:2])

    def _grey(self, frame: NDArray[np.uint8]) -> Any:
        import cv2

        scale = self._side / max(frame.shape[:2])
        sides = max(16, round(frame.shape[1] * scale)), max(16, round(frame.shape[0] * scale))
        return cv2.cvtColor(cv2.resize(frame, sides, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
