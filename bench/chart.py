# SPDX-License-Identifier: Apache-2.0
"""The chart of the report: how many times faster each op is than the fastest of its baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from bench.cases import OURS

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 920, 260, 150, 84, 46  # of the picture and its margins, in pixels
_BAR, _GAP = 17, 14
_SCALE = 2  # drawn larger, for sharp screens
_COLOURS = {"forward": "#1f6f8b", "backward": "#e0904c"}
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_INK, _FAINT, _PAPER = "#222222", "#d7d7d7", "#ffffff"


def _factor(row: Mapping[str, Any]) -> tuple[float, str]:
    """Times faster than the fastest baseline that is not a kernel of ours, and which it is."""
    others = {name: us for name, us in row["baselines"].items() if name not in OURS}
    name, us = min(others.items(), key=lambda item: item[1])
    return us / row["median_us"], name


def _bars(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, str]]]:
    """By op and direction: bfloat16 and the first shape that was measured. A step counts as forward."""
    bars: dict[str, dict[str, tuple[float, str]]] = {}
    for row in rows:
        if row["dtype"] == "bfloat16" and row["baselines"]:
            direction = "backward" if row["direction"] == "backward" else "forward"
            bars.setdefault(row["op"], {}).setdefault(direction, _factor(row))
    return dict(sorted(bars.items()))


def draw(rows: Sequence[Mapping[str, Any]], place: str) -> Image.Image:
    """A bar per op and direction, from where both are equally fast: to the right the op is faster, to the left slower.

    Args:
        rows: of a result, of one device.
        place: where they were measured; stands below.
    """
    bars = _bars(rows)
    height = _TOP + _BOTTOM + sum(_BAR * len(found) + _GAP for found in bars.values())
    picture = Image.new("RGB", (_WIDTH * _SCALE, height * _SCALE), _PAPER)
    pen = ImageDraw.Draw(picture)

    def text(x: float, y: float, words: str, size: int, anchor: str, colour: str = _INK) -> None:
        pen.text((x * _SCALE, y * _SCALE), words, colour, ImageFont.load_default(size * _SCALE), anchor)

    def box(left: float, top: float, right: float, bottom: float, colour: str) -> None:
        pen.rectangle([_SCALE * left, _SCALE * top, _SCALE * right - 1, _SCALE * bottom - 1], colour)

    factors = [factor for found in bars.values() for factor, _ in found.values()]
    low, high = min([0.5, *factors]) / 1.1, max([2.0, *factors]) * 1.1

    def x_of(factor: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(factor / low) / math.log(high / low)

    text(20, 24, "Times faster than the fastest baseline (bfloat16; the axis is logarithmic)", 18, "lm")
    for i, (direction, colour) in enumerate(_COLOURS.items()):
        box(_LEFT + 110 * i, 48, _LEFT + 110 * i + 12, 60, colour)
        text(_LEFT + 110 * i + 18, 54, direction, 13, "lm")
    for tick in (tick for tick in _TICKS if low <= tick <= high):
        box(x_of(tick), _TOP - 8, x_of(tick) + 1, height - _BOTTOM, _INK if tick == 1 else _FAINT)
        text(x_of(tick), _TOP - 14, f"{tick:g}", 12, "mm")
    y = float(_TOP)
    for op, found in bars.items():
        text(_LEFT - 12, y + _BAR * len(found) / 2, op, 14, "rm")
        for direction in (d for d in _COLOURS if d in found):
            factor, name = found[direction]
            left, right = sorted((x_of(1), x_of(factor)))
            box(left, y + 1, max(right, left + 1), y + _BAR - 1, _COLOURS[direction])
            text(right + 6, y + _BAR / 2, f"{factor:.1f}  {name}", 12, "lm")
            y += _BAR
        y += _GAP
    text(20, height - 20, place, 11, "lm", "#666666")
    return picture


def save(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
