# SPDX-License-Identifier: Apache-2.0
"""Clips that show the same: found by their small pictures, without comparing each with each.

Every clip is filed under a few coarse codes of its middle picture; clips with a code in common are compared in full. A
copy that was encoded anew or made smaller has most codes in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from talkingdit.curate.stages.signature import pictures_of

LEAST_DB, LEAST_CHANGE = 1.0, 0.15  # standard deviation of loudness and of movement below which they say nothing
TOGETHER = 0.9  # correlation of curves from which on clips are the same
ALIKE = 6.0  # mean difference of colour, of 255, up to which clips are the same
CODES, BITS = 8, 16
MOST_IN_A_BOX = 1000  # clips under one code that are compared; more of them say nothing (black pictures)
Curves = Sequence[Sequence[float] | None]


def groups(
    signatures: Sequence[str | None], seconds: Sequence[float], loudness: Curves = (), movement: Curves = ()
) -> list[int]:
    """The number of the first clip that each clip is the same as; its own where there is none.

    Clips whose pictures are alike are the same if they also sound alike over time; where one of them has no sound that
    changes, if they move alike; where nothing moves either, pictures alone decide.

    Args:
        signatures: of `SignatureStage`; None where a clip has none.
        seconds: length of each clip; lengths of copies differ by less than a tenth.
        loudness, movement: curves of `SignatureStage`; None or empty where a clip has none.
    """
    curves = [(given, least) for given, least in ((loudness, LEAST_DB), (movement, LEAST_CHANGE)) if given]
    first = list(range(len(signatures)))
    pictures = {i: pictures_of(s).astype(np.float32) for i, s in enumerate(signatures) if s}
    boxes: dict[tuple[int, int], list[int]] = defaultdict(list)
    planes = _planes()
    for i, picture in pictures.items():
        near: dict[int, None] = {}
        for number, code in enumerate(_codes(picture, planes)):
            box = boxes[number, code]
            near.update(dict.fromkeys(box[-MOST_IN_A_BOX:]))
            box.append(i)
        for j in near:
            as_long = abs(seconds[i] - seconds[j]) <= 0.1 * max(seconds[i], seconds[j])
            alike = as_long and np.abs(picture - pictures[j]).mean((1, 2, 3)).max() <= ALIKE
            if alike and _agree(curves, i, j):
                first[i] = first[j]
                break
    return first


def _agree(curves: Sequence[tuple[Curves, float]], i: int, j: int) -> bool:
    """Does the first curve that says something of two clips say that they are the same? Yes, where none does."""
    for given, least in curves:
        told = _together(given[i], given[j], least)
        if told is not None:
            return told
    return True


def _together(one: Sequence[float] | None, other: Sequence[float] | None, least: float) -> bool | None:
    """Do two curves rise and fall together? None where one is missing, or does not change by so much."""
    if not one or not other or len(one) != len(other):
        return None
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if min(a.std(), b.std()) < least:
        return None
    return bool(np.corrcoef(a, b)[0, 1] >= TOGETHER)


def _planes() -> NDArray[np.float32]:
    from talkingdit.curate.stages.signature import MOMENTS, SIDE

    size = len(MOMENTS) * SIDE * SIDE * 3
    return np.random.default_rng(0).standard_normal((size, CODES * BITS), np.float32)


def _codes(picture: NDArray[np.float32], planes: NDArray[np.float32]) -> list[int]:
    """On which side of random planes a clip lies, 16 of them a code (locality-sensitive hashing)."""
    flat = picture.reshape(-1)
    sides = ((flat - flat.mean()) @ planes > 0).reshape(CODES, BITS)
    return [int(code) for code in sides @ (1 << np.arange(BITS))]
