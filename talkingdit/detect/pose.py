# SPDX-License-Identifier: Apache-2.0
"""How a person stands: the 33 points of MediaPipe's pose network (BlazePose, arXiv:2006.10204)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from talkingdit.detect.tflite import back_to_frame, run, turned_crop, weights_of

NETWORK = "pose_landmark/pose_landmark_full"
OUTPUTS = ("Identity", "Identity_1", "Identity_4")  # points of the crop, is there anybody, points in metres
SIZE, POINTS = 256, 33
MARGIN = 1.25  # of the square around a person's box
SHOULDERS, HIPS = (11, 12), (23, 24)  # left and right ones of the person


@dataclass(frozen=True)
class Pose:
    """Points of a person.

    Attributes:
        points: [33, 2], pixels of the frame.
        visible: [33], probability of each to be seen.
        world: [33, 3], metres around the hips; x to the right of the picture, y down, z away from the camera.
        score: probability that there is a person at all.
    """

    points: NDArray[np.float64]
    visible: NDArray[np.float64]
    world: NDArray[np.float64]
    score: float

    @property
    def facing(self) -> float:
        """Degrees by which the body is turned away from the camera: 0 towards it, 90 to the right of the picture,
        -90 to the left, 180 or -180 away; from the line of the shoulders."""
        left, right = self.world[SHOULDERS[0]], self.world[SHOULDERS[1]]
        across = left - right
        # The body looks along the line of the shoulders turned by a quarter: (-z, x) of it, seen from above.
        return float(np.degrees(np.arctan2(-across[2], across[0])))


def available() -> bool:
    """Are the weights installed?"""
    return weights_of(NETWORK) is not None


def pose(frame: NDArray[np.uint8], box: tuple[float, float, float, float]) -> Pose:
    """The points of a person.

    Args:
        frame: uint8 [H, W, 3], RGB.
        box: x0, y0, x1, y1 around the person, in pixels.

    Raises:
        UserError: the weights are not installed.
    """
    x0, y0, x1, y1 = box
    side = MARGIN * max(x1 - x0, y1 - y0)
    crop, back = turned_crop(frame, ((x0 + x1) / 2, (y0 + y1) / 2), side, 0.0, SIZE)
    points, score, world = run(NETWORK, crop, OUTPUTS)
    local = points.reshape(-1, 5)[:POINTS]
    visible = 1 / (1 + np.exp(-np.clip(local[:, 3].astype(np.float64), -60, 60)))
    placed = back_to_frame(local[:, :2], back)
    return Pose(placed, visible, world.reshape(-1, 3)[:POINTS].astype(np.float64), float(score.reshape(-1)[0]))
