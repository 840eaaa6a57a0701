# SPDX-License-Identifier: Apache-2.0
"""Hands in a picture: MediaPipe Hands (arXiv:2006.10214), palms first, then 21 points on each hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from talkingdit.detect.boxes import Box, overlap
from talkingdit.detect.tflite import Floats, back_to_frame, run, sigmoid, turned_crop, weights_of

PALM, HAND = "palm_detection/palm_detection_full", "hand_landmark/hand_landmark_full"
PALM_SIZE, HAND_SIZE, POINTS = 192, 224, 21
STRIDES = ((8, 2), (16, 6))  # of the palm detector's maps, with the anchors in each cell
WRIST, MIDDLE = 0, 2  # of a palm's seven points: the wrist and the root of the middle finger
OVERLAP = 0.3
WIDER, FURTHER = 2.6, 0.5  # a hand's square in sizes of the palm's box, and how far it lies towards the fingers
LEAST_SIDE = 4.0  # pixels of a palm's box


@dataclass(frozen=True)
class Hand:
    """A hand that was found.

    Attributes:
        points: [21, 2] in pixels of the picture: wrist, then four points of each finger, thumb first.
        score: probability that it is a hand.
        side: which hand of the person it is, not the side of the picture.
    """

    points: NDArray[np.float64]
    score: float
    side: Literal["left", "right"]

    @property
    def box(self) -> Box:
        """x0, y0, x1, y1 around its points; it may reach out of the picture."""
        (x0, y0), (x1, y1) = self.points.min(0), self.points.max(0)
        return float(x0), float(y0), float(x1), float(y1)


def available() -> bool:
    """Are the weights installed?"""
    return weights_of(PALM) is not None and weights_of(HAND) is not None


def hands(frame: NDArray[np.uint8], threshold: float = 0.5) -> list[Hand]:
    """The hands of a picture, best first; none is an empty list.

    Args:
        frame: uint8 [H, W, 3], RGB.
        threshold: least score, of the palm and of the hand.

    Raises:
        UserError: the weights are not installed.
        ValueError: frame is something else.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size:
        raise ValueError(f"hands: frame must be uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
    found = [_hand(frame, box, points) for box, points in _palms(frame, threshold)]
    return _apart(sorted((hand for hand in found if hand.score >= threshold), key=lambda hand: -hand.score))


def _palms(frame: NDArray[np.uint8], threshold: float) -> list[tuple[Floats, Floats]]:
    """Boxes [4] (x, y of the middle, width, height) and points [7, 2] of palms, in pixels of the frame."""
    import cv2

    side = float(max(frame.shape[:2]))
    crop, _ = turned_crop(frame, (frame.shape[1] / 2, frame.shape[0] / 2), side, 0.0, PALM_SIZE)
    raw, logits = run(PALM, crop, ("Identity", "Identity_1"))
    scores = sigmoid(logits.reshape(-1))
    seen = np.nonzero(scores >= threshold)[0]
    raw = raw.reshape(-1, 18)[seen] / np.float32(PALM_SIZE)
    anchors = _anchors()[seen]
    to_frame = np.array([frame.shape[1] / 2, frame.shape[0] / 2], np.float32) - side / 2
    middle, sides = (raw[:, :2] + anchors) * side + to_frame, raw[:, 2:4] * side
    points = (raw[:, 4:].reshape(-1, 7, 2) + anchors[:, None]) * side + to_frame
    corners = np.concatenate([middle - sides / 2, sides], 1)
    kept = cv2.dnn.NMSBoxes(corners.tolist(), scores[seen].tolist(), threshold, OVERLAP)
    boxes = np.concatenate([middle, sides], 1)
    return [(boxes[i], points[i]) for i in np.asarray(kept, int).reshape(-1) if sides[i].min() >= LEAST_SIDE]


def _hand(frame: NDArray[np.uint8], box: Floats, palm: Floats) -> Hand:
    along = palm[MIDDLE] - palm[WRIST]
    angle = float(np.arctan2(along[1], along[0]) + np.pi / 2)  # of the crop, in which fingers point upwards
    side = float(max(box[2:]))
    towards = np.array([np.sin(angle), -np.cos(angle)]) * FURTHER * side
    centre = (float(box[0] + towards[0]), float(box[1] + towards[1]))
    crop, back = turned_crop(frame, centre, WIDER * side, angle, HAND_SIZE)
    points, score, right = run(HAND, crop, ("Identity", "Identity_1", "Identity_2"))
    # Programs that call this number the probability of a left hand look at a picture of a mirror.
    which: Literal["left", "right"] = "right" if float(right.reshape(-1)[0]) > 0.5 else "left"
    return Hand(back_to_frame(points.reshape(POINTS, 3)[:, :2], back), float(score.reshape(-1)[0]), which)


def _apart(found: list[Hand]) -> list[Hand]:
    """Of hands that lie on each other, the first."""
    kept: list[Hand] = []
    for hand in found:
        if all(overlap(hand.box, other.box) < 0.5 for other in kept):
            kept.append(hand)
    return kept


@lru_cache(maxsize=1)
def _anchors() -> Floats:
    """Middles of the palm detector's 2016 anchors, in sides of its input: [2016, 2] as (x, y)."""
    parts = []
    for stride, each in STRIDES:
        cells = PALM_SIZE // stride
        y, x = np.mgrid[:cells, :cells]
        parts.append(np.repeat((np.stack([x, y], -1).reshape(-1, 2) + 0.5) / cells, each, axis=0))
    return np.concatenate(parts).astype(np.float32)
