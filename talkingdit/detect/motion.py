# SPDX-License-Identifier: Apache-2.0
"""How much moves: optical flow by dense inverse search (arXiv:1603.03590), which OpenCV has."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Flow:
    """Flow between pictures that follow on each other, at a small size."""

    def __init__(self, side: int = 192) -> None:
        import cv2

        self._side = side
        self._search: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)

    def __call__(self, before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.float32]:
        """How far each place moves: float32 [h, w, 2] in parts of the longer side; pictures are uint8 [H, W, 3]."""
        flow = self._search.calc(self._grey(before), self._grey(after), None)
        found: NDArray[np.float32] = np.asarray(flow, np.float32) / max(flow.shape[:2])
        return found

    def _grey(self, frame: NDArray[np.uint8]) -> Any:
        import cv2

        scale = self._side / max(frame.shape[:2])
        sides = max(16, round(frame.shape[1] * scale)), max(16, round(frame.shape[0] * scale))
        return cv2.cvtColor(cv2.resize(frame, sides, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
