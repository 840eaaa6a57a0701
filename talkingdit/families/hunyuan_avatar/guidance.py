# SPDX-License-Identifier: Apache-2.0
"""Guidance of HunyuanVideo-Avatar: the released schedule, or separate strengths for text and audio.

As released, one strength g for text and voice together falls over the N steps, and what it leads away from changes:

    step i < 10    g = 2 + (1 - i / N) (g_0 - 2),   the negative prompt and silence, face masks times 0.6
    step i >= 10   g = 3.5 + 3 (1 - i / N),         the prompt and silence

With separate strengths, constant over the steps, v = v_00 + g_text (v_t0 - v_00) + g_audio (v_ta - v_t0), where 0
stands for the negative prompt and for silence.

Either may be taken in an interval of the steps alone (arXiv:2404.07724); the others make the one prediction that is
given everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from talkingdit.pipelines.guidance import Branch, guidance_branches
from talkingdit.pipelines.schedules import ALL_STEPS, Interval
from talkingdit.pipelines.step_cache import changes_of

EARLY_END = 2.0  # towards which the strength of the first steps falls


@dataclass(frozen=True)
class GuidanceView:
    """One prediction of a step: what it is given."""

    text: bool  # the prompt; else the negative one
    audio: bool  # the voices; else silence


@dataclass(frozen=True)
class StepGuidance:
    """How the predictions of a step are put together.

    Args:
        steps: of the denoising.
        start: strength of the released schedule at its beginning; at most 1 is no guidance.
        high, low: between which the strength falls over all steps, used behind the first `early_steps`.
        text, audio: separate strengths in place of the schedule; None for both is the schedule, for one of them 1.
        early_mask: of the face masks in the first steps.
        interval: shares of the steps that take guidance, see `Interval`.

    Raises:
        ValueError: a strength is negative or not finite.
    """

    steps: int
    start: float = 7.5
    high: float = 6.5
    low: float = 3.5
    text: float | None = None
    audio: float | None = None
    early_steps: int = 10
    early_mask: float = 0.6
    interval: tuple[float, float] = ALL_STEPS

    def __post_init__(self) -> None:
        for name, value in (("guidance", self.start), ("text_guidance", self.text), ("audio_guidance", self.audio)):
            if value is not None and (not math.isfinite(value) or value < 0):
                raise ValueError(f"generate: {name} must be a number of at least 0, got {value}")

    @property
    def separate(self) -> bool:
        """Are the strengths of text and voice apart, and constant?"""
        return self.text is not None or self.audio is not None

    def guided(self, step: int) -> bool:
        """Does a step take guidance?"""
        inside = bool(Interval(1.0, *self.interval, outside=0.0)(step, self.steps))
        return inside and (self.separate or self.start > 1)

    def views(self, step: int) -> tuple[GuidanceView, ...]:
        """The predictions of a step, in the order of `coefficients`."""
        given = GuidanceView(text=True, audio=True)
        if not self.guided(step):
            return (given,)
        if self.separate:
            return tuple(GuidanceView(branch.text, branch.audio) for branch in self._branches())
        return GuidanceView(text=step >= self.early_steps, audio=False), given

    def coefficients(self, step: int) -> list[float]:
        """Weights of the predictions of a step; they add up to one."""
        if not self.guided(step):
            return [1.0]
        if self.separate:
            return [branch.weight for branch in self._branches()]
        scale = self.scale_at(step)
        return [1.0 - scale, scale]

    def scale_at(self, step: int) -> float:
        """The strength of the released schedule."""
        rest = 1 - step / self.steps
        if step < self.early_steps:
            return rest * (self.start - EARLY_END) + EARLY_END
        return rest * (self.high - self.low) + self.low

    def mask_at(self, step: int) -> float:
        """What face masks are multiplied with."""
        return self.early_mask if step < self.early_steps else 1.0

    @property
    def predictions(self) -> int:
        """The most that a step has."""
        return max(len(self.views(step)) for step in range(self.steps))

    @property
    def changes(self) -> tuple[int, ...]:
        """Steps that make other predictions than the one before."""
        return changes_of([self.views(step) for step in range(self.steps)])

    def _branches(self) -> tuple[Branch, ...]:
        text = 1.0 if self.text is None else self.text
        audio = 1.0 if self.audio is None else self.audio
        return guidance_branches(text, audio)
