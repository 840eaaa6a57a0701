# SPDX-License-Identifier: Apache-2.0
"""Large faces, quickly: BlazeFace for short ranges (arXiv:1907.05047), 4 ms a picture on one core.

It sees a picture as 128 x 128 pixels, so a face of less than a sixth of its height escapes it; `faces.py` finds those.
It also sees drawn faces, which `faces.py` does not.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from talkingdit.detect.faces import Face, _separate
from talkingdit.detect.tflite import run, sigmoid, weights_of

NETWORK = "face_detection/face_detection_short_range"
SIDE = 128
GRIDS = ((16, 2), (8, 6))  # cells a side, and boxes per cell
# Of its six points: the eyes, the nose and the middle of the mouth, which stands for both corners.
POINTS = (0, 1, 2, 3, 3)


def available() -> bool:
    """Are the weights installed?"""
    return weights_of(NETWORK) is not None


def large_faces(frame: NDArray[np.uint8], threshold: float = 0.5) -> list[Face]:
    """The large faces of a picture, best first.

    Args:
        frame: uint8 [H, W, 3], RGB.
        threshold: least score.

    Raises:
        UserError: the weights are not installed.
    """
    import cv2

    height, width = frame.shape[:2]
    scale = SIDE / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (SIDE - rows) // 2, (SIDE - columns) // 2
    square = np.full((SIDE, SIDE, 3), -1, np.float32)
    small = cv2.resize(frame, (columns, rows), interpolation=cv2.INTER_AREA)
    square[top : top + rows, left : left + columns] = small.astype(np.float32) / 127.5 - 1
    scores, places = run(NETWORK, square, ("classificators", "regressors"))
    score = sigmoid(scores.reshape(-1))
    chosen = np.nonzero(score > threshold)[0]
    if not len(chosen):
        return []
    values = places.reshape(len(score), 8, 2)[chosen] / SIDE
    cells = _cells()[chosen]
    middle, sides, points = values[:, 0] + cells, values[:, 1], values[:, 2:] + cells[:, None]
    corners = np.concatenate([middle - sides / 2, middle + sides / 2], 1).reshape(-1, 2, 2)
    offset, limits = np.array([left, top]), np.array([width, height])
    corners = np.clip((corners * SIDE - offset) / scale, 0, limits)
    points = (points * SIDE - offset) / scale
    boxes = corners.reshape(-1, 4)
    kept = _separate(boxes.astype(np.float32), score[chosen].astype(np.float32))
    found = []
    for i in kept:
        x0, y0, x1, y1 = map(float, boxes[i])
        marks = tuple((float(x), float(y)) for x, y in points[i][[*POINTS]])
        found.append(Face(x0, y0, x1, y1, float(score[chosen[i]]), marks))
    return [face for face in found if face.x1 > face.x0 and face.y1 > face.y0]


@lru_cache(maxsize=1)
def _cells() -> NDArray[np.float64]:
    """The middle of the cell of every box, [896, 2] in parts of the square."""
    grids = []
    for cells, boxes in GRIDS:
        place = (np.arange(cells) + 0.5) / cells
        x, y = np.meshgrid(place, place)
        grids.append(np.stack([x, y], -1).reshape(-1, 2).repeat(boxes, 0))
    return np.concatenate(grids)
