# SPDX-License-Identifier: Apache-2.0
"""The one engine of long videos: clip after clip, in constant memory.

A clip depends on what comes before it through its carry alone, and has noise of its own: with the carry of a clip a
video can go on at any time, in another process and on another day.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from talkingdit.distributed.layout import Parallel
    from talkingdit.pipelines.inputs import Inputs, Outline

Carry = Mapping[str, Tensor]  # what a clip hands on to the next


@dataclass(frozen=True)
class GeneratedClip:
    """A finished clip."""

    index: int
    frames: Tensor  # [1, 3, n, H, W] float32 in -1..1
    carry: Carry | None  # None after the last clip


class ClipPipeline(Protocol):
    """What makes the clips of a video; a family's pipeline. It keeps no state: several videos may be made at once."""

    checkpoint: Any
    parallel: Parallel

    def warnings(self, inputs: Inputs, outline: Outline) -> tuple[str, ...]:
        """What is done differently from what may be expected, as the models tell: sentences."""
        return ()

    def remarks(self, conditions: Any, outline: Outline) -> tuple[str, ...]:
        """The same, as is known after the last clip."""
        return ()

    def encode(self, inputs: Inputs, outline: Outline) -> Any:
        """The conditions that all clips share."""

    def clip(
        self,
        conditions: Any,
        index: int,
        carry: Carry | None,
        *,
        last: bool = False,
        progress: Callable[[], None] | None = None,
    ) -> GeneratedClip:
        """Clip `index`, which goes on from the carry of the one before; None at the beginning.

        Args:
            last: no other clip follows, so no carry is made.
            progress: called after every denoising step.
        """


def generate_clips(
    pipeline: ClipPipeline,
    conditions: Any,
    count: int,
    first: int = 0,
    carry: Carry | None = None,
    progress: Callable[[], None] | None = None,
) -> Iterator[GeneratedClip]:
    """The clips of a video from `first` on, generated as they are asked for.

    Args:
        pipeline: of a family.
        conditions: from its `encode`.
        count: clips of the whole video.
        first: clip to begin with.
        carry: of the clip before `first`; None at the beginning.
        progress: called after every denoising step.

    Raises:
        ValueError: a carry is missing, or there is one at the beginning.
    """
    if (carry is None) != (first == 0):
        raise ValueError(f"generate: clip {first} {'needs' if first else 'takes no'} carry")
    for index in range(first, count):
        clip = pipeline.clip(conditions, index, carry, last=index == count - 1, progress=progress)
        carry = clip.carry
        yield clip
