# SPDX-License-Identifier: Apache-2.0
"""How the matrix products of framepack are cut into blocks of a GPU: parts of the sums, and their workspace."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

PRODUCTS = ("project", "grad_latents", "grad_weights")  # as csrc/core/framepack_gemm.h numbers them

_TILE = 128  # rows and columns of a block's results
_STEP_BYTES = 128  # of the summed axis that a block takes at a time
_SLOTS = 264  # blocks that run at a time: two on each of 132 multiprocessors. Other GPUs get the same cut, and bits
_BLOCK_STEPS = 4  # what a block costs besides its sums, in steps
_ELEMENTS_PER_STEP = 1 << 19  # partial sums that the whole device writes and reads again in the time of a step
_MOST_SPLITS = 64


@lru_cache(maxsize=256)
def plan(product: str, sizes: tuple[tuple[int, int, int], ...], item_size: int) -> tuple[tuple[int, ...], int]:
    """Parts that the sums of every bucket are cut into, and elements of the workspace for them.

    The cut depends on sizes only, so that results do not depend on the device. It weighs idle multiprocessors against
    the traffic of partial sums with rough costs.

    Args:
        product: one of ``PRODUCTS``.
        sizes: per bucket, tokens of all samples, output channels, and elements of a patch. Empty and pooled buckets
            have a zero among them.
        item_size: bytes per element.
    """
    problems = [_problem(product, size) if min(size) > 0 else (0, 0, 0) for size in sizes]
    steps = [-(-length * item_size // _STEP_BYTES) for _, _, length in problems]
    tiles = [-(-rows // _TILE) * -(-columns // _TILE) for rows, columns, _ in problems]
    work = sum(n * count for n, count in zip(steps, tiles, strict=True))

    best: tuple[float, tuple[int, ...]] | None = None
    for turns in (0.25, 0.5, 1, 2, 3, 4, 6):
        longest = max(1.0, work / (_SLOTS * turns))
        splits = tuple(max(1, min(_MOST_SPLITS, int(-(-n // longest)))) for n in steps)
        blocks = [
            (-(-n // part) + _BLOCK_STEPS, count * part)
            for n, count, part in zip(steps, tiles, splits, strict=True)
            if count
        ]
        cost = _duration(blocks) + _elements(product, problems, splits) / _ELEMENTS_PER_STEP
        if best is None or cost < best[0]:
            best = cost, splits
    assert best is not None
    return best[1], _elements(product, problems, best[1])


def _problem(product: str, size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Rows and columns of a bucket's result, and the length of its sums."""
    patches, out, taps = size
    if product == "project":
        return patches, out, taps
    return (patches, taps, out) if product == "grad_latents" else (out, taps, patches)


def _elements(product: str, problems: Sequence[tuple[int, int, int]], splits: Sequence[int]) -> int:
    """Elements of the workspace; a multiple of four per bucket."""
    total = 0
    for (rows, columns, _), parts in zip(problems, splits, strict=True):
        if rows and (parts > 1 or product == "grad_latents"):
            sums = rows * columns + (rows if product == "grad_weights" else 0)
            total += -(-parts * sums // 4) * 4
    return total


def _duration(blocks: Sequence[tuple[int, int]]) -> int:
    """Time until the last block of (steps, blocks) ends when the longest ones start first."""
    levels = {0: _SLOTS}  # slots by the time at which they are free
    for length, count in sorted(blocks, reverse=True):
        while count > 0:
            free = min(levels)
            taken = min(count, levels[free])
            levels[free + length] = levels.get(free + length, 0) + taken
            levels[free] -= taken
            if levels[free] == 0:
                del levels[free]
            count -= taken
    return max(levels)
