# SPDX-License-Identifier: Apache-2.0
"""Lines over seconds as an image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from talkingdit.media.sheet import TIME_STEPS, save_png
from talkingdit.media.style import COLOURS, FAINT, GRID, INK, PAPER
from talkingdit.media.targets import check_writable

WIDTH, HEIGHT = 1200, 420
LEFT, RIGHT, TOP, BOTTOM = 76, 220, 44, 48  # margins; the names of lines stand on the right
FINE = 3  # drawn so many times as large, for smooth edges
MORE = ((90, 90, 90), (226, 122, 168), (24, 160, 168), (130, 110, 60))


def line_chart(
    curves: Mapping[str, NDArray[np.float32]], seconds: Sequence[float], title: str, path: str | os.PathLike[str]
) -> None:
    """Draw lines over one time axis and write them as PNG (under a temporary name first).

    Args:
        curves: name -> [n] values.
        seconds: of the n values, ascending.
        title: says what the values are.
        path: target.

    Raises:
        UserError: the target cannot be written.
        ValueError: no curve, or one of another length.
    """
    target = check_writable(path)
    if not curves or any(len(values) != len(seconds) for values in curves.values()) or not len(seconds):
        raise ValueError(f"line_chart: expected one or more curves of {len(seconds)} values")
    small, normal = ImageFont.load_default(13 * FINE), ImageFont.load_default(16 * FINE)
    image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), PAPER)
    pen = ImageDraw.Draw(image)
    length = max(float(seconds[-1]), 1e-3)
    high = max(float(np.max(values)) for values in curves.values()) or 1.0
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(second: float, value: float) -> tuple[float, float]:
        return (
            (LEFT + second / length * (right - LEFT)) * FINE,
            (bottom - value / high * (bottom - TOP)) * FINE,
        )

    pen.text((LEFT * FINE, 14 * FINE), title, INK, normal)
    step = next((s for s in TIME_STEPS if length / s <= 16), TIME_STEPS[-1])
    for second in np.arange(0, length + 1e-9, step):
        x, _ = place(float(second), 0)
        pen.line((x, TOP * FINE, x, bottom * FINE), GRID, FINE)
        pen.text((x, (bottom + 6) * FINE), f"{second:g} s", FAINT, small, anchor="ma")
    for share in (0.0, 0.5, 1.0):
        _, y = place(0, share * high)
        pen.line((LEFT * FINE, y, right * FINE, y), GRID, FINE)
        pen.text(((LEFT - 8) * FINE, y), f"{share * high:.2g}", FAINT, small, anchor="rm")
    for number, (name, values) in enumerate(curves.items()):
        colour = (*COLOURS, *MORE)[number % (len(COLOURS) + len(MORE))]
        points = [place(float(s), float(v)) for s, v in zip(seconds, values, strict=True)]
        if len(points) > 1:
            pen.line(points, colour, 2 * FINE, joint="curve")
        else:
            pen.ellipse([points[0][0] - 6, points[0][1] - 6, points[0][0] + 6, points[0][1] + 6], fill=colour)
        y = (TOP + 22 * number) * FINE
        pen.rectangle(((right + 16) * FINE, y, (right + 28) * FINE, y + 12 * FINE), fill=colour)
        pen.text(((right + 36) * FINE, y + 6 * FINE), name, INK, small, anchor="lm")
    save_png(image.resize((WIDTH, HEIGHT), Image.Resampling.BOX), target, "figure")
