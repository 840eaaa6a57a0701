# SPDX-License-Identifier: Apache-2.0
"""The released step cache: on most of the later steps only the last block runs, on what went into it before.

What is kept belongs to latent frames, so that a window of other frames of a long video finds what its frames left the
last time they were computed, whichever window they were in. Reference and text are those of the last window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from talkingdit.families.hunyuan_avatar.sequence import ClipSpan, SequenceShard
from talkingdit.nn.context_parallel import gather

# Of 50 steps; the others run the last block only.
RELEASED_STEPS = frozenset([*range(15), 15, 20, 25, 30, 35, 40, *range(41, 50)])


def computes(step: int, steps: int) -> bool:
    """Is a step computed in full by the released schedule? It was made for 50 steps, and is scaled to others.

    Args:
        step: counted from 0.
        steps: of the whole.
    """
    return round(step * 49 / max(steps - 1, 1)) in RELEASED_STEPS or step == steps - 1


class LastBlockCache:
    """What went into the last block in the last step that was computed, of one guidance branch and one clip.

    Attributes:
        compute: of the next step; set by who plans the steps.
        kept: [B, n, dim], the tokens of this process.
    """

    def __init__(self) -> None:
        self.compute = True
        self.kept: Tensor | None = None

    @property
    def skips(self) -> bool:
        """Whether the next step is taken from what was kept."""
        return not self.compute and self.kept is not None

    def keep(self, x: Tensor, shard: SequenceShard) -> None:
        """After a computed step: x [B, n, dim], the tokens of this process. The last block may write over it."""
        self.kept = x.clone()

    def take(self, shard: SequenceShard) -> Tensor:
        """What was kept, as a tensor that may be written over."""
        assert self.kept is not None
        return self.kept.clone()


class FrameCache(LastBlockCache):
    """The same for a long video in windows, by latent frames.

    `at` says which frames the next window has. Processes that share a sequence each keep all of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._frames: dict[int, Tensor] = {}  # [B, S, dim]
        self._ends: tuple[Tensor, Tensor] | None = None  # reference and text [B, n, dim]
        self._window: tuple[int, ...] = ()

    def at(self, frames: Sequence[int], compute: bool) -> None:
        """Before a window: its latent frames in the video, and whether they are to be computed."""
        self._window, self.compute = tuple(frames), compute

    @property
    def skips(self) -> bool:
        return not self.compute and self._ends is not None and all(frame in self._frames for frame in self._window)

    def keep(self, x: Tensor, shard: SequenceShard) -> None:
        clip = self._clip(shard)
        whole = x if shard.context is None else gather(x, shard.context, shard.tokens)
        reference, video, text = whole.split([clip.reference, clip.video, clip.text], dim=1)
        for frame, tokens in zip(self._window, video.split(clip.per_frame, dim=1), strict=True):
            self._frames[frame] = tokens.clone()
        self._ends = reference.clone(), text.clone()

    def take(self, shard: SequenceShard) -> Tensor:
        assert self._ends is not None
        reference, text = self._ends
        whole = torch.cat([reference, *(self._frames[frame] for frame in self._window), text], dim=1)
        return whole[:, shard.begin : shard.end].contiguous()

    def _clip(self, shard: SequenceShard) -> ClipSpan:
        """The one clip of the sequence."""
        (clip,) = shard.clips
        if clip.grid[0] != len(self._window):
            raise ValueError(f"FrameCache: at() named {len(self._window)} frames of a window of {clip.grid[0]}")
        return clip
