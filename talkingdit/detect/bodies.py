# SPDX-License-Identifier: Apache-2.0
"""Where people are in a picture: MediaPipe's selfie segmentation, one mask for all of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from talkingdit.detect.tflite import run, weights_of

NETWORK = "selfie_segmentation/selfie_segmentation"
SIZE = 256
LEAST_SHARE = 0.005  # of the picture; less is nobody


def available() -> bool:
    """Are the weights installed?"""
    return weights_of(NETWORK) is not None


def person_mask(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probability of each pixel to be a person: float32 [H, W] of a frame uint8 [H, W, 3] RGB.

    Raises:
        UserError: the weights are not installed.
    """
    import cv2

    small = np.asarray(cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_AREA), np.float32)
    (mask,) = run(NETWORK, small / np.float32(255), ("activation_10",))
    size = (frame.shape[1], frame.shape[0])
    return np.asarray(cv2.resize(mask.reshape(SIZE, SIZE), size, interpolation=cv2.INTER_LINEAR), np.float32)


def body(frame: NDArray[np.uint8], threshold: float = 0.5) -> tuple[float, float, float, float] | None:
    """Box x0, y0, x1, y1 around everybody in a picture, in pixels; None where nobody is.

    Raises:
        UserError: the weights are not installed.
    """
    inside = person_mask(frame) > threshold
    if inside.mean() < LEAST_SHARE:
        return None
    # Specks do not count: a row or column belongs to the box if a hundredth of it is person.
    rows = np.nonzero(inside.mean(1) > 0.01)[0]
    columns = np.nonzero(inside.mean(0) > 0.01)[0]
    if not len(rows) or not len(columns):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
