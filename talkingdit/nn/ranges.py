# SPDX-License-Identifier: Apache-2.0
"""Tokens of one kind that stand in several ranges of a sequence: out of it and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[int, int]  # begin, end


def take_ranges(x: Tensor, ranges: Sequence[Range]) -> Tensor:
    """These ranges of the tokens x [B, N, dim], behind each other; a view where there is one."""
    parts = [x[:, begin:end] for begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def scatter_ranges(y: Tensor, ranges: Sequence[Range], tokens: int) -> Tensor:
    """The inverse of `take_ranges` for N = `tokens`: zeros elsewhere."""
    if len(ranges) == 1:
        return F.pad(y, (0, 0, ranges[0][0], tokens - ranges[0][1]))
    parts, filled, used = [], 0, 0
    for begin, end in ranges:
        parts += [y.new_zeros(y.shape[0], begin - filled, y.shape[2]), y[:, used : used + end - begin]]
        filled, used = end, used + end - begin
    return torch.cat([*parts, y.new_zeros(y.shape[0], tokens - filled, y.shape[2])], dim=1)
