# SPDX-License-Identifier: Apache-2.0
"""Boxes in a picture: x0, y0, x1, y1 in pixels, x to the right and y down."""

from __future__ import annotations

Box = tuple[float, float, float, float]


def overlap(a: Box, b: Box) -> float:
    """What two boxes have in common, as a share of both together."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / max(both, 1e-9)
