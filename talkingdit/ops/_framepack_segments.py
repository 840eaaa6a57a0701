# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a packed history are: the rope segments that match :func:`framepack`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from talkingdit.ops._rope_layout import Segment
from talkingdit.ops.framepack import PADDINGS, Bucket, bucket_grid

__all__ = ["framepack_segments"]


def _subsampled(first: float, last: float, count: int) -> list[float]:
    """``count`` positions from first to last, truncated to integers towards zero."""
    return [float(np.trunc(position)) for position in np.linspace(first, last, count)]


def _averaged(positions: Sequence[float], ratio: int, count: int) -> list[list[float]]:
    """Boxes of ``ratio`` positions each; beyond the end the last position is repeated."""
    last = len(positions) - 1
    return [[positions[min(i * ratio + j, last)] for j in range(ratio)] for i in range(count)]


def framepack_segments(
    buckets: Sequence[Bucket],
    size: tuple[int, int],
    times: Sequence[float],
    mode: str = "subsample",
    base: tuple[int, int, int] = (1, 2, 2),
    padding: str = "zero",
) -> list[Segment]:
    """One rope segment per bucket, with the tokens of :func:`framepack` in the same order.

    Positions count patches of the base embedding: a token of a bucket with kernel (4, 8, 8) covers 4 x 4 x 4 of them.

    Args:
        buckets: as given to ``framepack`` (weights are not looked at).
        size: (H, W) of the latents.
        times: temporal position of every frame of the latents: ``range(-19, 0)`` for Wan-S2V's buffer of 19.
        mode: "subsample" spreads the tokens of an axis evenly from its first to its last position and truncates to
            integers (Wan-S2V: the four tokens of frames -19 .. -4 are at -19, -14, -9, -4). "average" gives a token the
            mean rotation of everything it covers, after repeating the last position (FramePack).
        base: kernel of the base patch embedding.
        padding: as given to ``framepack``.

    Returns:
        Segments for :class:`RopeLayout`. A bucket without tokens has none.

    Raises:
        ValueError: an unknown mode or padding, a kernel that is no multiple of the base, frames without a time.
    """
    if mode not in ("subsample", "average"):
        raise ValueError(f"framepack_segments: mode must be 'subsample' or 'average', got {mode!r}")
    if padding not in PADDINGS:
        raise ValueError(f"framepack_segments: padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    segments = []
    for bucket in buckets:
        if any(k % b for k, b in zip(bucket.kernel, base, strict=True)):
            raise ValueError(
                f"framepack_segments: kernel must be a multiple of the base {tuple(base)}, got {tuple(bucket.kernel)}"
            )
        moments = [float(times[frame]) for frame in bucket.indices(len(times))]
        grid = bucket_grid(len(moments), size, bucket.kernel, padding)
        if 0 in grid:
            continue
        fine = bucket_grid(len(moments), size, base, padding)
        axes: list[list[float]] = [
            moments[:: base[0]][: fine[0]],
            [float(i) for i in range(fine[1])],
            [float(i) for i in range(fine[2])],
        ]
        if mode == "subsample":
            rows = [_subsampled(axis[0], axis[-1], count) for axis, count in zip(axes, grid, strict=True)]
            segments.append(Segment(*rows))
        else:
            ratios = [k // b for k, b in zip(bucket.kernel, base, strict=True)]
            boxes = [_averaged(axis, r, count) for axis, r, count in zip(axes, ratios, grid, strict=True)]
            segments.append(Segment(*boxes))
    return segments
