# SPDX-License-Identifier: Apache-2.0
"""Places of the tokens of Wan-S2V in the rotary embedding."""

from __future__ import annotations

import functools
from typing import Any

from talkingdit.nn.framepack import packed_segments
from talkingdit.ops import RopeLayout, Segment

Packing = tuple[tuple[int, ...], str, str, int]


@functools.lru_cache(maxsize=64)
def layout_at(
    grid: tuple[int, int, int], head_dim: int, reference_time: float | None, past: int | Packing | None
) -> RopeLayout:
    """See `talkingdit.families.wan_s2v.conditions.sequence_layout`."""
    frames, rows, columns = grid
    segments = [Segment(range(frames), range(rows), range(columns))]
    if reference_time is not None:
        segments.append(Segment([reference_time], range(rows), range(columns)))
    if isinstance(past, int):
        segments.append(Segment(range(-past, 0), range(rows), range(columns)))
    elif past is not None:
        buckets, drop_mode, padding, add_last = past
        segments += packed_segments(buckets, drop_mode, padding, 2 * rows, 2 * columns, add_last)
    return RopeLayout(segments, split=head_split(head_dim))


def layout_of(*place: Any) -> RopeLayout:
    """`layout_at` as the compiler can hold it: of a function that remembers, it cannot make a constant."""
    return layout_at(*place)


def head_split(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with time, height and width."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side
