# SPDX-License-Identifier: Apache-2.0
"""Rotary tables that a model has made itself, in the form that the kernels read.

The numbers are the model's own, so extrapolated, rescaled or rounded tables keep their meaning.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from talkingdit.ops import RopeLayout

_END = 2**31 - 1


class TableLayout(RopeLayout):
    """A layout over given rotations.

    Args:
        table: float32 (float64 for float64 tensors) [2, n]: cosines, sines.
        index: int64 [segments, 7], see `RopeLayout`.
        pairs: rotated pairs per axis.
        length: number of tokens.
    """

    def __init__(self, table: Tensor, index: Tensor, pairs: tuple[int, int, int], length: int):
        self._table, self._index = table, index
        self.pairs = list(pairs)
        self.split = (2 * pairs[0], 2 * pairs[1], 2 * pairs[2])
        self.dim = sum(self.split)
        self.length = length
        self.pairing = "interleaved"

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._index.is_cuda and not torch.compiler.is_compiling():
            # It may be a kept one, made on another stream: its memory must outlast what this stream does with it.
            self._index.record_stream(torch.cuda.current_stream(self._index.device))
        return self._table, self._index


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_rows(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> TableLayout:
    """A layout for tensors of `dtype` with one row of cosines and sines [N, D / 2] per token."""
    table = torch.stack([cos, sin]).to(_wide(dtype)).flatten(1)
    # One segment of one axis, made on the device: nothing is copied to it, nor kept between calls and graphs.
    index = torch.zeros(1, 7, dtype=torch.int64, device=table.device)
    index[:, 1] = _END
    index[:, 2:4] = 1
    return TableLayout(table, index, (cos.shape[1], 0, 0), cos.shape[0])


@lru_cache(maxsize=64)
def _grid_index(
    sizes: tuple[tuple[int, int, int], ...], tokens: int, pairs: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, tuple[int, int, int]]:
    """Segments of samples of `tokens` tokens each, and the rows that the tables of the axes must have.

    Tokens behind a grid are not rotated: their rows of ones lie behind those of the largest grid.
    """
    rows = [max(size[axis] for size in sizes) + 1 for axis in range(3)]
    padding = max(tokens - f * h * w for f, h, w in sizes)
    starts = [0, rows[0] * pairs[0], rows[0] * pairs[0] + rows[1] * pairs[1]]
    still = [start + (n - 1) * width for start, n, width in zip(starts, rows, pairs, strict=True)]
    index = []
    for sample, (f, h, w) in enumerate(sizes):
        begin, middle = sample * tokens, sample * tokens + f * h * w
        index.append([begin, middle, h, w, *starts])
        if f * h * w < tokens:
            index.append([middle, begin + tokens, 1, tokens - f * h * w, *still])
    rows[2] += max(padding - 1, 0)
    return torch.tensor(index, device=device), (rows[0], rows[1], rows[2])


def grid_rows(freqs: Tensor, sizes: tuple[tuple[int, int, int], ...], tokens: int, dtype: torch.dtype) -> TableLayout:
    """A layout for a batch laid end to end, each sample a grid (F, H, W) of `tokens` tokens with its padding.

    Args:
        freqs: complex [positions, D / 2], the rotations of every position, with the axes side by side: two sixths of
            the head dim, rounded down, for h and for w, the rest for t.
        sizes: grid of each sample.
        tokens: tokens per sample; those beyond the grid are not rotated.
        dtype: of the tensors to rotate.
    """
    half = freqs.shape[1]
    pairs = (half - 2 * (half // 3), half // 3, half // 3)
    make = _grid_index.__wrapped__ if torch.compiler.is_compiling() else _grid_index
    index, rows = make(sizes, tokens, pairs, freqs.device)
    parts = []
    for axis, (table, count) in enumerate(zip(freqs.split(pairs, dim=1), rows, strict=True)):
        used = max(size[axis] for size in sizes)
        parts += [table[:used], torch.ones_like(table[:1]).expand(count - used, -1)]
    planes = torch.view_as_real(torch.cat([part.flatten() for part in parts])).to(_wide(dtype))
    return TableLayout(planes.T.contiguous(), index, pairs, len(sizes) * tokens)
