# SPDX-License-Identifier: Apache-2.0
"""Where tokens are: segments of a sequence, their positions, and the rotation tables made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RopeLayout", "Segment"]

Positions = Sequence[Any] | np.ndarray | Tensor


def _rows(name: str, positions: Positions) -> tuple[np.ndarray, ...]:
    """One float64 array of positions per row."""
    if isinstance(positions, Tensor):
        positions = positions.detach().cpu().double().numpy()
    rows = tuple(np.atleast_1d(np.asarray(row, dtype=np.float64)) for row in positions)
    for index, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or not np.isfinite(row).all():
            raise ValueError(
                f"Segment: {name}[{index}] must be a finite position or a list of them, got {positions[index]}"
            )
    return rows


class Segment:
    """A grid of tokens, t-major, then h, then w, with a position for every index of every axis.

    Args:
        t, h, w: positions of an axis, one per row: numbers (integer, fractional or negative), or lists of numbers,
            whose rotations are averaged (not renormalised), as FramePack does for pooled history. Tensors and arrays of
            one or two dimensions are taken as well. ``h`` and ``w`` may be left away for sequences with one axis.

    Raises:
        ValueError: a position is not finite or a row has none.
    """

    __slots__ = ("h", "t", "w")

    def __init__(self, t: Positions, h: Positions = (0,), w: Positions = (0,)) -> None:
        self.t = _rows("t", t)
        self.h = _rows("h", h)
        self.w = _rows("w", w)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of rows of (t, h, w)."""
        return len(self.t), len(self.h), len(self.w)

    def __len__(self) -> int:
        return len(self.t) * len(self.h) * len(self.w)

    def __repr__(self) -> str:
        return "Segment({} x {} x {})".format(*self.shape)


class RopeLayout:
    """A sequence of segments and the way they are rotated (arXiv:2104.09864, per axis).

    Channel pair i of an axis with d channels rotates by ``position * theta ** (-2 i / d)``, computed in float64.

    Args:
        segments: in token order.
        split: channels of the head dim for (t, h, w), all even: (44, 42, 42) for Wan, (16, 56, 56) for HunyuanVideo.
            One number, e.g. (128,), is a sequence with one axis.
        theta: base of the frequencies: 10000 for Wan, 256 for HunyuanVideo and FramePack.
        pairing: "interleaved" pairs channels (2 i, 2 i + 1), "half" pairs (i, i + D / 2).

    Raises:
        ValueError: no segment, an odd split, theta <= 0, an unknown pairing, or too many tokens.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        split: Sequence[int] = (44, 42, 42),
        theta: float = 10000.0,
        pairing: str = "interleaved",
    ) -> None:
        if len(segments) == 0:
            raise ValueError("RopeLayout: segments must hold at least one Segment, got an empty list")
        axes = tuple(int(channels) for channels in split)
        if len(axes) not in (1, 3) or any(c < 0 or c % 2 for c in axes) or sum(axes) == 0:
            raise ValueError(f"RopeLayout: split must be 1 or 3 even channel counts (t, h, w), got {tuple(split)}")
        if not theta > 0:
            raise ValueError(f"RopeLayout: theta must be positive, got {theta}")
        if pairing not in ("interleaved", "half"):
            raise ValueError(f"RopeLayout: pairing must be 'interleaved' or 'half', got {pairing!r}")
        self.segments = tuple(segments)
        self._describe((*axes, 0, 0)[:3], float(theta), pairing)  # type: ignore[arg-type]
        self._table, self._index = self._build()

    def _describe(self, split: tuple[int, int, int], theta: float, pairing: str) -> None:
        """All but the tables."""
        self.split = split
        self.theta = theta
        self.pairing = pairing
        self.pairs = [channels // 2 for channels in self.split]
        self.dim = sum(self.split)
        self.length = sum(len(segment) for segment in self.segments)
        if self.length >= 2**31:
            raise ValueError(f"RopeLayout: a layout must have fewer than 2**31 tokens, got {self.length}")
        # With the stream that the tables' memory belongs to.
        self._on_device: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, torch.cuda.Stream | None]] = {}

    @classmethod
    def packed(cls, layouts: Sequence[RopeLayout]) -> RopeLayout:
        """One layout for several clips, of different sizes too, packed into one sequence. Their tables are reused.

        Raises:
            ValueError: the layouts differ in split, theta or pairing, or there are too many tokens.
        """
        first = layouts[0]
        for other in layouts[1:]:
            if (other.split, other.theta, other.pairing) != (first.split, first.theta, first.pairing):
                raise ValueError("RopeLayout.packed: layouts must agree in split, theta and pairing")
        packed = cls.__new__(cls)
        packed.segments = tuple(segment for layout in layouts for segment in layout.segments)
        packed._describe(first.split, first.theta, first.pairing)
        index, elements, tokens = [], 0, 0
        for layout in layouts:
            index.append(layout._index + torch.tensor([tokens, tokens, 0, 0, elements, elements, elements]))
            elements, tokens = elements + layout._table.shape[1], tokens + len(layout)
        packed._table, packed._index = torch.cat([layout._table for layout in layouts], dim=1), torch.cat(index)
        return packed

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"RopeLayout({list(self.segments)}, split={self.split}, theta={self.theta:g}, pairing={self.pairing!r})"

    def _build(self) -> tuple[Tensor, Tensor]:
        """Rotation rows [2 (cos, sin), n] in float64 and the segment table [segments, 7] in int64.

        A row of the segment table is (begin, end, H, W, t_row, h_row, w_row): token range, grid, and where the rows of
        each axis begin in the rotation table (csrc/core/rope3d.h).
        """
        planes: list[np.ndarray] = []
        index: list[list[int]] = []
        elements = tokens = 0
        for segment in self.segments:
            starts = []
            for rows, channels in zip((segment.t, segment.h, segment.w), self.split, strict=True):
                starts.append(elements)
                if channels == 0:
                    continue
                frequencies = self.theta ** (-np.arange(0, channels, 2, dtype=np.float64) / channels)
                for row in rows:
                    angles = row[:, None] * frequencies
                    planes.append(np.stack([np.cos(angles).mean(0), np.sin(angles).mean(0)]))
                    elements += channels // 2
            _, height, width = segment.shape
            index.append([tokens, tokens + len(segment), height, width, *starts])
            tokens += len(segment)
        table = np.concatenate(planes, axis=1) if planes else np.zeros((2, 0))
        return torch.from_numpy(table), torch.tensor(index, dtype=torch.int64)

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rotation table (float64 for float64 tensors, else float32) and the segment table on a device.

        They are made once per device and kept. Call it before capturing a CUDA graph. On another stream than the one
        they were made on, their memory is not given away before that stream has done what it was asked for until now,
        should the layout be dropped meanwhile.
        """
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        if torch.compiler.is_compiling():
            found = self._on_device.get((device, precision))
            return found[:2] if found is not None else (self._table.to(device, precision), self._index.to(device))
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if (device, precision) not in self._on_device:
            made = self._table.to(device, precision), self._index.to(device), stream
            self._on_device[(device, precision)] = made
        table, index, home = self._on_device[(device, precision)]
        if stream is not None and stream != home:
            table.record_stream(stream)
            index.record_stream(stream)
        return table, index

    def rotations(self) -> Tensor:
        """The rotation of every token, complex128 [N, D / 2]: the table that kernels never build."""
        parts = []
        table = torch.complex(self._table[0], self._table[1])
        for (_, _, height, width, *starts), segment in zip(self._index.tolist(), self.segments, strict=True):
            frames = len(segment.t)
            sizes = (frames, height, width)
            axes = [
                table[start : start + size * pairs].view(size, pairs)
                for start, size, pairs in zip(starts, sizes, self.pairs, strict=True)
            ]
            grid = torch.cat(
                [
                    axes[0][:, None, None, :].expand(*sizes, -1),
                    axes[1][None, :, None, :].expand(*sizes, -1),
                    axes[2][None, None, :, :].expand(*sizes, -1),
                ],
                dim=-1,
            )
            parts.append(grid.reshape(-1, self.dim // 2))
        return torch.cat(parts)
