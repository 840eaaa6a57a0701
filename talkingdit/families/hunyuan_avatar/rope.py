# SPDX-License-Identifier: Apache-2.0
"""Places of the tokens of HunyuanVideo-Avatar: the video from 0 on, the reference in front of it (section 3.1)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from talkingdit.families.hunyuan_avatar.sequence import ClipSpan
from talkingdit.ops import RopeLayout, Segment


class Layouts(NamedTuple):
    """Places of the tokens of a sequence."""

    image: RopeLayout  # of its image tokens alone, for the double blocks
    whole: RopeLayout  # of all; text stands at 0 on every axis, which is no rotation


class RopePositions(NamedTuple):
    """How positions turn channels, and where the reference stands."""

    split: tuple[int, int, int]  # channels of a head for time, height and width
    theta: float
    time: float  # of the reference
    shift: bool  # equation 2: the reference stands beside the video, beyond its last row and column


def layouts(config: Any, clips: Sequence[ClipSpan]) -> Layouts:
    """The places of the clips of a sequence.

    Args:
        config: of a `HunyuanAvatarModel`: rope_dim_list, rope_theta, reference_time, reference_shift.
        clips: of the sequence, in order.
    """
    time, height, width = config.rope_dim_list
    places = RopePositions(
        (time, height, width), float(config.rope_theta), float(config.reference_time), bool(config.reference_shift)
    )
    image = [_layout(clip.grid, bool(clip.reference), 0, places) for clip in clips]
    whole = [_layout(clip.grid, bool(clip.reference), clip.text, places) for clip in clips]
    if len(clips) == 1:
        return Layouts(image[0], whole[0])
    return Layouts(RopeLayout.packed(image), RopeLayout.packed(whole))


@functools.lru_cache(maxsize=64)
def _layout(grid: tuple[int, int, int], reference: bool, text: int, places: RopePositions) -> RopeLayout:
    frames, rows, columns = grid
    segments = []
    if reference:
        down, right = (rows, columns) if places.shift else (0, 0)
        segments.append(Segment([places.time], range(down, down + rows), range(right, right + columns)))
    segments.append(Segment(range(frames), range(rows), range(columns)))
    if text:
        segments.append(Segment([0] * text))
    return RopeLayout(segments, split=places.split, theta=places.theta)
