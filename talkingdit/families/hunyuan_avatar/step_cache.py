# SPDX-License-Identifier: Apache-2.0
"""The released step cache: on most of the later steps only the last block runs, on what went into it before.

What is kept belongs to latent frames, so that a window of other frames of a long video finds what its frames left the
last time they were computed, whichever window they were in.
"""

from __future__ import annotations

from torch import Tensor

from talkingdit.families.hunyuan_avatar.sequence import SequenceShard

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
    """What went into the last block in the last step that was computed, of one guidance branch.

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
        """After a computed step: x [B, n, dim]. The last block may write over it."""
        self.kept = x.clone()

    def take(self, shard: SequenceShard) -> Tensor:
        """What was kept, as a tensor that may be written over."""
        assert self.kept is not None
        return self.kept.clone()
