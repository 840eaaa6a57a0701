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

ALIKE = 6.0  # mean difference of colour, of 255, up to which clips are the same
CODES, BITS = 8, 16
MOST_IN_A_BOX = 200  # clips under one code that are compared; more of them say nothing (black pictures)


def groups(signatures: Sequence[str | None], seconds: Sequence[float]) -> list[int]:
    """The number of the first clip that each clip is the same as; its own where there is none.

    Args:
        signatures: of `SignatureStage`; None where a clip has none.
        seconds: length of each clip; lengths of copies differ by less than a tenth.
    """
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
            if as_long and np.abs(picture - pictures[j]).mean((1, 2, 3)).max() <= ALIKE:
                first[i] = first[j]
                break
    return first


def _planes() -> NDArray[np.float32]:
    from talkingdit.curate.stages.signature import MOMENTS, SIDE

    size = len(MOMENTS) * SIDE * SIDE * 3
    return np.random.default_rng(0).standard_normal((size, CODES * BITS), np.float32)


def _codes(picture: NDArray[np.float32], planes: NDArray[np.float32]) -> list[int]:
    """On which side of random planes a clip lies, 16 of them a code (locality-sensitive hashing)."""
    flat = picture.reshape(-1)
    sides = ((flat - flat.mean()) @ planes > 0).reshape(CODES, BITS)
    return [int(code) for code in sides @ (1 << np.arange(BITS))]
