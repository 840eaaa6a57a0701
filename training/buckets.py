# SPDX-License-Identifier: Apache-2.0
"""What size a video is trained at: under a limit of tokens, with its own aspect (Wan-S2V, section 4.1).

A video whose tokens after patchify are no more than the limit M is used as it is. A larger one is resized or cropped,
sides in steps of 16 pixels (two latent cells), until it fits; where it would become too small, it is cut in time, as
are stored latents, which cannot be resized. Buckets restrict durations and sizes to a few, so that clips of equal
shape can be stacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from talkingdit.data.sample import ClipRequest, Shape

# (latent frames, rows, columns, reference?, latent frames of history) -> tokens in the sequence
CountTokens = Callable[[int, int, int, bool, int], int]
STEP = 2  # latent cells of a side: one token is 2 x 2 cells, 16 x 16 pixels


def patches(frames: int, height: int, width: int, reference: bool = False, history: int = 0) -> int:
    """Tokens of a clip whose conditions are not packed: 1 x 2 x 2 latent cells each."""
    return (frames + int(reference) + history) * (height // STEP) * (width // STEP)


@dataclass(frozen=True)
class Fit:
    """The clip to ask for and the tokens it has."""

    clip: ClipRequest
    tokens: int


class Buckets:
    """Chooses the clip of a video.

    Args:
        limit: most tokens of a clip, M; 0: any number.
        frames: allowed durations in latent frames; empty: any.
        sizes: allowed (rows, columns) in latent cells; empty: any multiple of two.
        fit: "resize" keeps the aspect; "crop" cuts the longer side, down to a square, before anything is resized.
        smallest: latent cells of the shorter side to which a video is shrunk before it is shortened instead.
        count: tokens of a clip with its conditions.

    Raises:
        ValueError: a duration or size that no clip can have.
    """

    def __init__(
        self,
        limit: int = 0,
        frames: Sequence[int] = (),
        sizes: Sequence[tuple[int, int]] = (),
        fit: Literal["resize", "crop"] = "resize",
        smallest: int = 24,
        count: CountTokens = patches,
    ) -> None:
        if limit < 0:
            raise ValueError(f"batch.tokens must not be negative, got {limit}")
        if any(n < 1 for n in frames):
            raise ValueError(f"buckets: durations must be at least one latent frame, got {list(frames)}")
        for height, width in sizes:
            if height < STEP or width < STEP or height % STEP or width % STEP:
                raise ValueError(
                    f"buckets: sides must be multiples of {8 * STEP} pixels, got {8 * width} x {8 * height}"
                )
        self.limit = limit or math.inf
        self.frames = sorted(frames, reverse=True)
        self.sizes = list(sizes)
        self.crops = fit == "crop"
        self.smallest = smallest
        self._count = count
        self._known: dict[tuple[Shape, bool | None], Fit | None] = {}

    def fit(self, shape: Shape, begins: bool | None = None) -> Fit | None:
        """The largest allowed clip of a video; None if every clip of it is too large or it is too short.

        Args:
            begins: as in `ItemStream`.
        """
        key = shape, begins
        if key not in self._known:
            self._known[key] = self._find(replace(shape, history=0) if begins else shape, begins)
        return self._known[key]

    def _find(self, shape: Shape, begins: bool | None) -> Fit | None:
        # Longest first: a video is shrunk before it is shortened; if neither helps, its shortest clip is shrunk
        # further. An image has one duration.
        durations = self.frames if shape.frames > 1 else [1]
        allowed = [n for n in durations or range(shape.frames, 0, -1) if n <= shape.frames]
        choices = [(frames, self.smallest) for frames in allowed] + [(frames, STEP) for frames in reversed(allowed)]
        for frames, smallest in choices:
            size = self._shrunk(shape, frames, smallest) if shape.resizable else self._stored(shape, frames)
            if size is not None:
                history = None if begins is None else not begins
                clip = ClipRequest(frames=frames, height=size[0], width=size[1], history=history)
                return Fit(clip, self._count(frames, *size, shape.reference, shape.history))
        return None

    def _fits(self, shape: Shape, frames: int, size: tuple[int, int]) -> bool:
        return self._count(frames, *size, shape.reference, shape.history) <= self.limit

    def _stored(self, shape: Shape, frames: int) -> tuple[int, int] | None:
        size = shape.height, shape.width
        allowed = not self.sizes or size in self.sizes
        return size if allowed and self._fits(shape, frames, size) else None

    def _shrunk(self, shape: Shape, frames: int, smallest: int) -> tuple[int, int] | None:
        if self.sizes:
            area = shape.height * shape.width
            fitting = [s for s in self.sizes if s[0] * s[1] <= area and self._fits(shape, frames, s)]
            aspect = math.log(shape.height / shape.width)
            # The nearest aspect; of several sizes of that aspect the largest.
            return min(fitting, key=lambda s: (abs(math.log(s[0] / s[1]) - aspect), -s[0] * s[1]), default=None)
        tall = shape.height >= shape.width
        long, short = (shape.height, shape.width) if tall else (shape.width, shape.height)
        candidates = list(_resized(long, short))
        if self.crops:
            square = _even(short)
            candidates = [(n, square) for n in range(_even(long), square, -STEP)] + list(_resized(short, short))
        # From the largest; the first is always allowed, however small the video is.
        for large, small in candidates:
            if small < smallest and (large, small) != candidates[0]:
                break
            size = (large, small) if tall else (small, large)
            if self._fits(shape, frames, size):
                return size
        return None


def _even(cells: int) -> int:
    """The largest allowed side within `cells`."""
    return max(STEP, cells // STEP * STEP)


def _resized(long: int, short: int) -> Iterator[tuple[int, int]]:
    """Sides of a frame and of all smaller ones of its aspect, largest first; the shorter side follows the longer."""
    yield _even(long), _even(short)
    for side in range(_even(long) - STEP, 0, -STEP):
        yield side, max(STEP, round(side * short / long / STEP) * STEP)
