# SPDX-License-Identifier: Apache-2.0
"""468 points on a face (MediaPipe's face mesh, arXiv:1907.06724): how far a mouth is open, what a face expresses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from talkingdit.detect.faces import Face
from talkingdit.detect.tflite import back_to_frame, run, sigmoid, turned_crop, weights_of

NETWORK = "face_landmark/face_landmark"
SIZE, POINTS = 192, 468
MARGIN = 1.5  # of the square around a face's box
# Numbers of points, as MediaPipe has them.
UPPER_LIP, LOWER_LIP, MOUTH_LEFT, MOUTH_RIGHT = 13, 14, 61, 291
FOREHEAD, CHIN = 10, 152
EYES = (33, 263)  # outer corners
STILL = (33, 133, 362, 263, 168, 6, 197, 195, 5, 4, 1, 10, 151, 9, 8)  # eyes' corners, nose, forehead: no muscle moves

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Mesh:
    """Points of one face.

    Attributes:
        points: [468, 3], pixels of the frame; depth in the same scale.
        score: probability that there is a face at all.
    """

    points: Points
    score: float

    @property
    def opening(self) -> float:
        """Distance of the lips' inner edges over the height of the face: 0 closed, about 0.25 wide open."""
        gap = np.linalg.norm(self.points[UPPER_LIP] - self.points[LOWER_LIP])
        return float(gap / max(1e-6, float(np.linalg.norm(self.points[FOREHEAD] - self.points[CHIN]))))

    @property
    def width(self) -> float:
        """Width of the mouth over the distance of the eyes' outer corners."""
        mouth = np.linalg.norm(self.points[MOUTH_LEFT] - self.points[MOUTH_RIGHT])
        return float(mouth / max(1e-6, float(np.linalg.norm(self.points[EYES[0]] - self.points[EYES[1]]))))

    def geometry(self) -> NDArray[np.float64]:
        """The mesh without the place, size and turn of the head: [468 * 3], in distances of the eyes.

        Turned so that eyes and nose lie as in a face seen from the front, by the rotation that fits the points that no
        muscle moves best (Kabsch 1976).
        """
        centred = self.points - self.points[list(STILL)].mean(0)
        scale = max(1e-6, float(np.linalg.norm(self.points[EYES[0]] - self.points[EYES[1]])))
        turn = _upright(centred[list(STILL)])
        flat: NDArray[np.float64] = (centred @ turn.T / scale).ravel()
        return flat


def available() -> bool:
    """Are the weights installed?"""
    return weights_of(NETWORK) is not None


def mesh(frame: NDArray[np.uint8], face: Face) -> Mesh:
    """The points of a face that was found.

    Args:
        frame: uint8 [H, W, 3], RGB.
        face: from `faces`.

    Raises:
        UserError: the weights are not installed.
    """
    centre = ((face.x0 + face.x1) / 2, (face.y0 + face.y1) / 2)
    side = MARGIN * max(face.x1 - face.x0, face.y1 - face.y0)
    angle = 0.0
    if len(face.landmarks) >= 2:
        (lx, ly), (rx, ry) = face.landmarks[:2]
        angle = float(np.arctan2(ry - ly, rx - lx))
    crop, back = turned_crop(frame, centre, side, angle, SIZE)
    points, flag = run(NETWORK, crop, ("conv2d_21", "conv2d_31"))
    local = points.reshape(POINTS, 3)
    depth = local[:, 2:] * side / SIZE
    placed = np.concatenate([back_to_frame(local[:, :2], back), depth], 1)
    return Mesh(placed, float(sigmoid(flag.ravel()[0])))


def _upright(points: Points) -> Points:
    """The rotation that brings the still points of a face onto those of the reference."""
    reference = np.array(REFERENCE)
    reference = reference - reference.mean(0)
    left, _, right = np.linalg.svd((points - points.mean(0)).T @ reference)
    mirror = np.diag([1, 1, np.sign(np.linalg.det(right.T @ left.T))])
    turn: Points = right.T @ mirror @ left.T
    return turn


# The points STILL of an average face seen from the front, in distances of the eyes' outer corners (x right, y down, z
# away from the camera): measured on `skimage.data.astronaut()` and its mirror image, whose mean has no left and right.
REFERENCE = (
    (-0.499, -0.018, 0.251),
    (-0.187, 0.010, 0.192),
    (0.187, 0.010, 0.192),
    (0.499, -0.018, 0.251),
    (0.000, -0.056, 0.005),
    (0.000, 0.034, -0.035),
    (0.000, 0.118, -0.082),
    (0.000, 0.194, -0.133),
    (0.000, 0.275, -0.188),
    (0.000, 0.374, -0.205),
    (0.000, 0.446, -0.177),
    (0.000, -0.584, -0.012),
    (0.000, -0.412, -0.028),
    (0.000, -0.233, -0.029),
    (0.000, -0.139, -0.004),
)
