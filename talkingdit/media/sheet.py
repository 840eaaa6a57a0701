# SPDX-License-Identifier: Apache-2.0
"""An image that shows at a glance what came out: frames, the waveform and measured curves on one time axis."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from talkingdit.atomic import whole_file
from talkingdit.errors import UserError
from talkingdit.media.checks import reason_of
from talkingdit.media.style import COLOURS, FAINT, GRID, INK, PAPER, WAVE
from talkingdit.media.targets import check_writable

MARGIN, GAP = 28, 6
LABELS = 52  # pixels left of the plots, for the scale
WIDTH = 1400
WAVE_HEIGHT, CURVE_HEIGHT = 96, 128
TIME_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


def preview_sheet(
    frames: np.ndarray,
    waveform: np.ndarray,
    rate: int,
    fps: float,
    curves: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    times: Sequence[float] | None = None,
    columns: int = 10,
    rows: int = 2,
) -> None:
    """Draw the sheet and write it as PNG (under a temporary name first).

    Frames are taken from the middle of equal parts of the video, so that each one stands for its share of the time;
    marks on the curves show where. Waveform and curves lie below on one time axis.

    Args:
        frames: uint8 [F, H, W, 3] RGB: the whole video, or, with `times`, the frames to show.
        waveform: float [samples] mono; shown from 0 to the end of the video.
        rate: of the waveform, in Hz.
        fps: frames per second of the video and of the curves.
        curves: name -> [frames] values per video frame, usually 0..1 (the axis grows if they exceed it; NaN leaves a
            gap). The first is drawn filled, the others as lines.
        path: target PNG.
        title: a line above the frames.
        times: seconds of the given frames, when `frames` holds a selection only (long videos need not be kept).
        columns, rows: at most so many frames.

    Raises:
        UserError: the target cannot be written.
        ValueError: shapes or numbers that do not fit.
    """
    target = check_writable(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames) or frames.dtype != np.uint8:
        raise ValueError(f"preview_sheet: frames must be uint8 [F, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    if waveform.ndim != 1 or rate < 1 or not fps > 0 or columns < 1 or rows < 1:
        raise ValueError(
            f"preview_sheet: waveform must be [samples] and rate, fps, columns and rows positive, "
            f"got {tuple(waveform.shape)}, {rate}, {fps}, {columns}, {rows}"
        )
    lines = {name: np.asarray(values, dtype=np.float64) for name, values in curves.items()}
    for name, values in lines.items():
        if values.ndim != 1:
            raise ValueError(f"preview_sheet: curve {name!r} must be [frames], got shape {values.shape}")
    if times is None:
        shown = sample_frames(len(frames), columns * rows)
        chosen, moments, length = frames[shown], [(int(i) + 0.5) / fps for i in shown], len(frames) / fps
    else:
        if len(times) != len(frames):
            raise ValueError(f"preview_sheet: times must be one per frame ({len(frames)}), got {len(times)}")
        chosen, moments = frames[: columns * rows], [float(t) for t in times][: columns * rows]
        length = max([len(waveform) / rate, *(len(v) / fps for v in lines.values()), max(moments)])
    sheet = _Sheet(chosen, moments, columns, length, title, bool(lines))
    sheet.draw_waveform(waveform, rate)
    if lines:
        sheet.draw_curves(lines, fps)
    sheet.draw_time_axis()
    save_png(sheet.image, target, "sheet")


def sample_frames(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` frames out of `count`: the middles of equal parts."""
    shown = min(count, most)
    return np.floor((np.arange(shown) + 0.5) * count / shown).astype(int)


class _Sheet:
    """The canvas: frames on top, then one plot below the other, all plots on the same time axis."""

    def __init__(
        self, frames: np.ndarray, moments: list[float], columns: int, length: float, title: str, curves: bool
    ) -> None:
        self.length, self.moments = length, moments
        columns = min(columns, len(frames))
        rows = math.ceil(len(frames) / columns)
        cell = (WIDTH - 2 * MARGIN - GAP * (columns - 1)) // columns
        height, width = frames.shape[1:3]
        # Few frames must not fill the sheet.
        scale = min(cell / width, 260 / height)
        cell_width, cell_height = max(1, round(width * scale)), max(1, round(height * scale))
        top = MARGIN + (38 if title else 0)
        self.small, self.normal = ImageFont.load_default(13), ImageFont.load_default(15)
        frames_bottom = top + rows * (cell_height + 24)
        self.wave_top = frames_bottom + 30
        self.curve_top = self.wave_top + WAVE_HEIGHT + 40
        self.bottom = self.curve_top + CURVE_HEIGHT if curves else self.wave_top + WAVE_HEIGHT
        self.left, self.right = MARGIN + LABELS, WIDTH - MARGIN
        self.image = Image.new("RGB", (WIDTH, self.bottom + 44), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        if title:
            self.draw.text((MARGIN, MARGIN - 6), title, INK, ImageFont.load_default(20))
        whole = columns * cell_width + (columns - 1) * GAP
        method = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS
        for number, (frame, moment) in enumerate(zip(frames, moments, strict=True)):
            x = (WIDTH - whole) // 2 + number % columns * (cell_width + GAP)
            y = top + number // columns * (cell_height + 24)
            self.image.paste(Image.fromarray(frame).resize((cell_width, cell_height), method), (x, y))
            self._text((x + cell_width / 2, y + cell_height + 3), f"{moment:.2f} s", FAINT, "ma")

    def x(self, seconds: np.ndarray | float) -> np.ndarray:
        return self.left + np.asarray(seconds) / self.length * (self.right - self.left)

    def _text(self, at: tuple[float, float], text: str, colour: tuple[int, int, int], anchor: str) -> None:
        self.draw.text(at, text, colour, self.small, anchor=anchor)

    def _frame(self, top: int, height: int, name: str) -> None:
        """Background of a plot: vertical lines at the time steps, marks where the frames were taken."""
        self.draw.rectangle((self.left, top, self.right, top + height), fill=(255, 255, 255), outline=GRID)
        for second in self._steps():
            x = float(self.x(second))
            self.draw.line((x, top, x, top + height), GRID)
        for moment in self.moments:
            x = float(self.x(moment))
            self.draw.polygon([(x - 4, top - 6), (x + 4, top - 6), (x, top)], fill=FAINT)
        if name:
            self.draw.text((self.left, top - 12), name, INK, self.normal, anchor="ls")

    def _steps(self) -> np.ndarray:
        step = next((s for s in TIME_STEPS if self.length / s <= 16), TIME_STEPS[-1])
        return np.arange(0, self.length + 1e-9, step)

    def draw_waveform(self, waveform: np.ndarray, rate: int) -> None:
        """Extremes per pixel column, scaled to the loudest sample."""
        top, middle = self.wave_top, self.wave_top + WAVE_HEIGHT // 2
        self._frame(top, WAVE_HEIGHT, "voice")
        width = self.right - self.left
        edges = np.linspace(0, self.length * rate, width + 1).astype(int)
        peak = float(np.abs(waveform[: edges[-1]]).max(initial=0.0)) or 1.0
        for column, (start, end) in enumerate(itertools.pairwise(edges)):
            piece = waveform[start : max(end, start + 1)]
            if len(piece):
                reach = np.array([piece.max(), piece.min()]) / peak * (WAVE_HEIGHT / 2 - 5)
                x = self.left + column
                self.draw.line((x, middle - float(reach[0]), x, middle - float(reach[1])), WAVE)

    def draw_curves(self, lines: Mapping[str, np.ndarray], fps: float) -> None:
        """Curves over the middles of their frames, drawn at four times the size for smooth edges."""
        top, fine = self.curve_top, 4
        self._frame(top, CURVE_HEIGHT, "")
        finite = np.concatenate([[0.0, 1.0], *(v[np.isfinite(v)] for v in lines.values())])
        low, high = float(finite.min()), float(finite.max())

        def y(value: np.ndarray | float) -> np.ndarray:
            return CURVE_HEIGHT - 4 - (np.asarray(value) - low) / (high - low) * (CURVE_HEIGHT - 8)

        for value in (low, (low + high) / 2, high):
            self._text((self.left - 8, top + float(y(value))), f"{value:.2g}", FAINT, "rm")
        box = (self.left, top, self.right, top + CURVE_HEIGHT)
        size = ((self.right - self.left) * fine, CURVE_HEIGHT * fine)
        name_x = self.left + 0.0
        for number, (name, values) in enumerate(lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            layer = Image.new("L", size, 0)
            pen = ImageDraw.Draw(layer)
            x = (self.x((np.arange(len(values)) + 0.5) / fps) - self.left) * fine
            for start, end in _runs(np.isfinite(values)):
                points = list(zip(x[start:end].tolist(), (y(values[start:end]) * fine).tolist(), strict=True))
                if number == 0:
                    base = float(y(max(low, 0.0))) * fine
                    pen.polygon([(points[0][0], base), *points, (points[-1][0], base)], fill=52)
                pen.line(points, fill=255, width=2 * fine, joint="curve")
            mask = layer.resize((size[0] // fine, size[1] // fine), Image.Resampling.BOX)
            self.image.paste(Image.new("RGB", mask.size, colour), box[:2], mask)
            self.draw.rectangle((name_x, top - 22, name_x + 11, top - 11), fill=colour)
            self.draw.text((name_x + 18, top - 12), name, INK, self.normal, anchor="ls")
            name_x += 42 + self.draw.textlength(name, self.normal)

    def draw_time_axis(self) -> None:
        """Seconds below the last plot."""
        for second in self._steps():
            x = float(self.x(second))
            self.draw.line((x, self.bottom, x, self.bottom + 5), FAINT)
            self._text((x, self.bottom + 8), f"{second:g} s", FAINT, "ma")


def _runs(good: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of stretches of at least two true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(int)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 1]


def save_png(image: Image.Image, target: Path, name: str) -> None:
    """Write an image, whole or not at all; UserError with the name of what it is where that fails."""
    try:
        with whole_file(target, prefix=f".{target.stem[:40]}.", suffix=".part") as temporary:
            image.save(temporary, "PNG")  # optimize=True takes six times as long for a file 4 % smaller
    except OSError as error:
        raise UserError(f"{name} {str(target)!r}: could not be written ({reason_of(error)})") from None
