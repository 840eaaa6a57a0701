# SPDX-License-Identifier: Apache-2.0
"""Layouts for the tests of rope3d and qk_norm_rope3d."""

from __future__ import annotations

from talkingdit.ops import RopeLayout, Segment


def make_layout(pairing: str = "interleaved", split: tuple[int, ...] = (8, 6, 6)) -> RopeLayout:
    """Of a grid, fractional and negative positions, and means of several positions."""
    segments = [
        Segment(range(3), range(2), range(4)),
        Segment([30], [0.5, 1.5], [-2.25, 7]),
        Segment([[-3, -2], [-1]], [[0, 1]], [[0, 1], [2, 3, 4]]),
    ]
    return RopeLayout(segments, split, pairing=pairing)


def small_layout(split: tuple[int, int, int], pairing: str) -> RopeLayout:
    """27 tokens: an anchor, a video of three frames, a pooled history."""
    segments = [
        Segment([30], range(2), [0.5, 1.5]),
        Segment(range(3), range(2), range(3)),
        Segment([[-2, -1]], [0], range(5)),
    ]
    return RopeLayout(segments, split=split, pairing=pairing)


# Heads narrower and wider than a warp's share, a number of them that fills no warp, a dim (22) that vectors do not fit.
HEADS = [
    (3, (12, 10, 10), "half"),
    (5, (44, 42, 42), "interleaved"),
    (5, (44, 42, 42), "half"),
    (9, (4, 2, 2), "interleaved"),
    (2, (6, 8, 8), "interleaved"),
]
