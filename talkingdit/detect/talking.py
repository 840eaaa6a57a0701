# SPDX-License-Identifier: Apache-2.0
"""Heads as SyncNet and Light-ASD were trained to see them: cut out along a track, with more room below than above.

The square is 1.4 times the longer side of the face's box and hangs down from its upper edge, as both programs have it;
Light-ASD reads the middle of it, where mouth and chin are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from talkingdit.detect.light_asd import SIDE

HEAD = 224  # pixels
ROOM = 0.4  # of half the box, to both sides, and twice that below
STEADY = 13  # pictures over which a box is steadied, by the median
OUTSIDE = 110  # grey of what lies outside of the picture

Pictures = npt.NDArray[np.uint8]


def heads(pictures: Pictures, boxes: npt.NDArray[np.floating[Any]]) -> Pictures:
    """Heads of one person: uint8 [F, 224, 224, 3].

    Args:
        pictures: uint8 [F, H, W, 3].
        boxes: [F, 4], x0, y0, x1, y1 of the face, in pixels.
    """
    import cv2

    corners = boxes.astype(np.float64)
    half = _steady((corners[:, 2:] - corners[:, :2]).max(1) / 2)
    x, y = (_steady((corners[:, i] + corners[:, i + 2]) / 2) for i in range(2))
    out = np.empty((len(pictures), HEAD, HEAD, 3), np.uint8)
    for i, picture in enumerate(pictures):
        around = max(1, int(half[i] * (1 + 2 * ROOM)))
        padded = cv2.copyMakeBorder(picture, around, around, around, around, cv2.BORDER_CONSTANT, value=(OUTSIDE,) * 3)
        middle, row = x[i] + around, y[i] + around
        wide = half[i] * (1 + ROOM)
        low, left = int(row - half[i]), int(middle - wide)
        high, right = int(row + half[i] * (1 + 2 * ROOM)), int(middle + wide)
        cut = padded[low : max(low + 1, high), left : max(left + 1, right)]
        out[i] = cv2.resize(cut, (HEAD, HEAD), interpolation=cv2.INTER_LINEAR)
    return out


def mouths(heads: Pictures) -> Pictures:
    """What Light-ASD reads of heads: uint8 [F, 112, 112], grey."""
    import cv2

    first = (HEAD - SIDE) // 2
    middle = heads[:, first : first + SIDE, first : first + SIDE]
    return np.stack([cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in middle])


def _steady(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    padded = np.pad(values, STEADY // 2, mode="edge")
    found: npt.NDArray[np.float64] = np.median(np.lib.stride_tricks.sliding_window_view(padded, STEADY), axis=1)
    return found
