# SPDX-License-Identifier: Apache-2.0
"""Boxes in a picture as people write them: x0,y0,x1,y1 in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


def read_box(text: str) -> Box | None:
    """A box from "x0,y0,x1,y1"; None for something else."""
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        return None
    return (x0, y0, x1, y1) if all(map(math.isfinite, (x0, y0, x1, y1))) else None


def write_box(box: Sequence[float]) -> str:
    """The words of a box."""
    return ",".join(f"{side:g}" for side in box)
