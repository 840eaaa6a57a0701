# SPDX-License-Identifier: Apache-2.0
"""Pictures of people with known boxes, painted with gradients and soft spots so that a detector of faces finds them."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

Box = tuple[float, float, float, float]


def painted_face(size: int = 160, skin: tuple[int, int, int] = (205, 160, 130)) -> np.ndarray:
    """A head from the front, uint8 [size, size, 3]; the face is about the middle 68 % in width and 88 % in height."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    u, v = (x - size / 2) / (size * 0.34), (y - size / 2) / (size * 0.44)
    image = np.full((size, size, 3), (90, 110, 130), np.float32)
    image[(u / 1.15) ** 2 + ((v + 0.15) / 1.12) ** 2 < 1] = (40, 28, 20)  # hair
    shade = np.clip(1.1 - 0.45 * (u**2 + v**2) - 0.15 * u, 0, 1.2)[..., None]
    head = (u**2 + v**2 < 1) & (v > 0.1 * np.cos(3 * u) - 0.62)
    image[head] = (np.array(skin) * shade)[head]

    def spot(at: Box, colour: tuple[int, int, int], strength: float = 1.0) -> None:
        """A soft spot at (u, v) of a half width and height."""
        weight = strength * np.exp(-1.5 * (((u - at[0]) / at[2]) ** 2 + ((v - at[1]) / at[3]) ** 2))[..., None]
        image[:] = image * (1 - weight) + np.array(colour, np.float32) * weight

    for side in (-1, 1):
        spot((side * 0.4, -0.18, 0.26, 0.14), (110, 75, 60), 0.6)
        spot((side * 0.4, -0.15, 0.17, 0.075), (240, 235, 230))
        spot((side * 0.4, -0.15, 0.085, 0.08), (40, 25, 15))
        spot((side * 0.4, -0.35, 0.26, 0.05), (50, 32, 22), 0.9)
        spot((side * 0.45, 0.25, 0.25, 0.2), (220, 130, 110), 0.3)
        spot((side * 0.1, 0.28, 0.06, 0.04), (90, 50, 40), 0.7)
    spot((0, 0.05, 0.07, 0.25), (235, 195, 165), 0.5)
    spot((0.12, 0.1, 0.05, 0.25), (130, 90, 70), 0.35)
    spot((0, 0.33, 0.2, 0.04), (120, 80, 65), 0.5)
    spot((0, 0.55, 0.28, 0.07), (160, 60, 60))
    spot((0, 0.55, 0.26, 0.02), (80, 25, 25))
    spot((0, 0.68, 0.2, 0.04), (140, 100, 80), 0.5)
    return np.clip(cv2.GaussianBlur(image, (0, 0), max(size / 120, 0.5)), 0, 255).astype(np.uint8)


def painted_people(height: int, width: int, heads: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, list[Box]]:
    """A picture uint8 [height, width, 3] with heads, each (left, top, size), and the box of each face."""
    image = np.full((height, width, 3), 120, np.uint8)
    boxes = []
    for i, (left, top, size) in enumerate(heads):
        image[top : top + size, left : left + size] = painted_face(size, ((205, 160, 130), (190, 145, 115))[i % 2])
        middle = left + size / 2, top + size * 0.56
        boxes.append(
            (middle[0] - size * 0.32, middle[1] - size * 0.36, middle[0] + size * 0.32, middle[1] + size * 0.36)
        )
    return image, boxes
