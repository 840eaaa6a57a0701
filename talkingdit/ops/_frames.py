# SPDX-License-Identifier: Apache-2.0
"""Frames of a contiguous shard of tokens."""

from __future__ import annotations


def even_frames(tokens: int, tokens_per_frame: int, token_offset: int) -> list[tuple[slice, slice]]:
    """Ranges of tokens and of frames, such that all frames of a range have equally many tokens in it.

    That is all of them, where no frame is cut; else the rest of a frame, whole ones, and the beginning of one.
    """
    rest = min(-token_offset % tokens_per_frame, tokens)
    first, whole = -(-token_offset // tokens_per_frame), (tokens - rest) // tokens_per_frame
    end = rest + whole * tokens_per_frame
    ranges = []
    if rest:
        ranges.append((slice(0, rest), slice(first - 1, first)))
    if whole:
        ranges.append((slice(rest, end), slice(first, first + whole)))
    if end < tokens:
        ranges.append((slice(end, tokens), slice(first + whole, first + whole + 1)))
    return ranges or [(slice(0, 0), slice(0, 1))]
