# SPDX-License-Identifier: Apache-2.0
"""Two ways to compute less in some steps: the released step cache, and TeaCache.

As released, on most of the later steps only the last block runs, on what went into it before. What is kept belongs to
latent frames, so that a window of other frames of a long video finds what its frames left the last time they were
computed, whichever window they were in. Reference and text are those of the last window.

With TeaCache (`talkingdit.pipelines.step_cache`) a step is skipped where the modulated input of the first block has
changed little. It depends on the latents, so the decision is made step by step. What is used again are the predictions
of every frame, as windows move on from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talkingdit.families.hunyuan_avatar.sequence import ClipSpan, SequenceShard
from talkingdit.nn.context_parallel import gather
from talkingdit.pipelines.step_cache import Fitted, Recorder, TeaCache, fitted_of, relative_change

BACKBONE, WIDTH = "hunyuan-video", 3072  # whose coefficients serve a checkpoint of its width without its own

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


# ---- TeaCache --------------------------------------------------------------------------------------------------------
def fitted_for(config: Any, folder: Path) -> Fitted:
    """Coefficients for a checkpoint; UserError where there are none."""
    return fitted_of(folder, BACKBONE if config.hidden_size == WIDTH else None)


class TeaSteps:
    """Which steps of a stage are computed, by TeaCache.

    Args:
        inputs: ``inputs(latents, step)`` gives the modulated input of a step.
        latents: [C, L, h, w] in front of the first step, or what is looked at of them.
        begin, end: steps of the stage, whose first one is computed.
        breaks: further steps that are computed, since what is predicted there is another thing than before.
        steps: of the whole denoising.
        decide: of processes that must decide alike: gives all of them what the function returns in one.
    """

    def __init__(
        self,
        inputs: Callable[[Tensor, int], Tensor],
        latents: Tensor,
        threshold: float,
        fitted: Fitted,
        *,
        begin: int,
        end: int,
        steps: int,
        breaks: Sequence[int] = (),
        decide: Callable[[Callable[[], bool]], bool] = lambda function: function(),
    ) -> None:
        self._inputs, self._latents, self._begin, self._decide = inputs, latents, begin, decide
        self._breaks = frozenset((begin, *breaks))
        # Of steps that are always computed, those that lie in this stage.
        self._first, self._last, self._stage = fitted.first - begin, max(0, fitted.last - (steps - end)), end - begin
        self._fitted, self._threshold = fitted, threshold
        self._cache: TeaCache | None = None
        self._decided: dict[int, bool] = {}

    def computed(self, step: int) -> bool:
        """Whether a step asks the model. Steps are asked for in their order, each as often as one likes."""
        if step < self._begin:
            return True
        if step not in self._decided:
            self._decided[step] = self._decide(lambda: self._computes(step))
        return self._decided[step]

    def _computes(self, step: int) -> bool:
        if self._cache is None or step in self._breaks:
            done = step - self._begin
            self._cache = TeaCache(
                self._fitted.coefficients, self._threshold, steps=self._stage - done,
                first=max(1, self._first - done), last=self._last,
            )  # fmt: skip
        return self._cache.compute(self._inputs(self._latents, step))

    def after(self, latents: Tensor) -> None:
        """The latents after a step, which may be written over when the next one has been decided."""
        self._latents = latents


class Changes:
    """What calibration measures of a video: how the input of a step has changed, and how its velocity.

    The velocity is that of the update, so that windows may move on.
    """

    def __init__(self, inputs: Callable[[Tensor, int], Tensor], recorder: Recorder, latents: Tensor) -> None:
        self._inputs, self._recorder = inputs, recorder
        self._latents = latents.clone()
        self._before: tuple[Tensor, Tensor] | None = None

    def after(self, latents: Tensor, step: int, size: float) -> None:
        """After a step of this size, the difference of two noise levels."""
        now = self._inputs(self._latents, step), (latents - self._latents) / size
        if self._before is not None:
            self._recorder.changes_in.append(float(relative_change(now[0], self._before[0])))
            self._recorder.changes_out.append(float(relative_change(now[1], self._before[1])))
        self._before, self._latents = now, latents.clone()
