# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance with separate strengths for text and audio, as a weighted sum of model predictions.

With v(text, audio) the prediction given (t, a) or denied (0) a condition, and strengths of which 1 means none beyond
the condition itself, the forms are rows of coefficients:

    form           v                                                              sum
    "text_first"   v_00 + g_text (v_t0 - v_00) + g_audio (v_ta - v_t0)              1
    "audio_first"  v_00 + g_audio (v_0a - v_00) + g_text (v_ta - v_0a)              1
    "printed"      g_audio v_ta + (1 + g_text - g_audio) v_t0 + (1 - g_text) v_00   2

"text_first" is that of Sonic and EchoMimicV3, and with equal strengths the single one of Wan-S2V and
HunyuanVideo-Avatar; "audio_first" is StableAvatar's. "printed" is equation 3 of SkyReels-Audio (arXiv:2506.00830) with
1 + omega for a strength: its coefficients sum to 2, which doubles the conditioned velocity where there is no guidance.
Without one v_t0 too many it is "text_first", the default. There v_00 is denied the pictures too.

A prediction with weight zero is not computed: strengths (1, 1) cost one evaluation, (1, g) two, (g, g) two, else three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from talkingdit import ops
from talkingdit.pipelines.schedules import Schedule, schedule

T = TypeVar("T")
Form = Literal["text_first", "audio_first", "printed"]
FORMS = ("text_first", "audio_first", "printed")


@dataclass(frozen=True)
class Branch:
    """One prediction of the sum: which conditions it is given, and its weight."""

    text: bool
    audio: bool
    weight: float


def guidance_branches(text: float, audio: float, form: Form = "text_first") -> tuple[Branch, ...]:
    """The predictions that guidance of these strengths needs; the fully conditioned one first.

    Args:
        text: strength of the prompt; 1 is none beyond the condition itself, 0 ignores the prompt.
        audio: strength of the voice, likewise.
        form: see above; weights sum to one but for "printed".

    Raises:
        ValueError: a strength is negative or not finite, or another form.
    """
    for name, value in (("text", text), ("audio", audio)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"guidance: {name} guidance must be a number of at least 0, got {value}")
    if form not in FORMS:
        raise ValueError(f"guidance: form must be one of {', '.join(FORMS)}, got {form!r}")
    between = {"text_first": text - audio, "audio_first": audio - text, "printed": 1.0 + text - audio}[form]
    by_audio = form == "audio_first"
    branches = (
        Branch(text=True, audio=True, weight=text if by_audio else audio),
        Branch(text=not by_audio, audio=by_audio, weight=between),
        Branch(text=False, audio=False, weight=1.0 - (audio if by_audio else text)),
    )
    return tuple(branch for branch in branches if branch.weight != 0.0)


@dataclass(frozen=True)
class Guidance:
    """Guidance of a whole video, step by step.

    Args:
        steps: denoising steps S.
        text, audio: strengths, numbers or schedules (`schedules.py`).
        form: see above.
    """

    steps: int
    text: float | Schedule = 1.0
    audio: float | Schedule = 1.0
    form: Form = "text_first"

    def branches(self, step: int) -> tuple[Branch, ...]:
        """The predictions that a step needs.

        Raises:
            ValueError: as `guidance_branches`.
        """
        text, audio = schedule(self.text), schedule(self.audio)
        return guidance_branches(text(step, self.steps), audio(step, self.steps), self.form)

    def coefficients(self, step: int) -> list[float]:
        """The weights of a step, as `long_video.denoise` takes them."""
        return [branch.weight for branch in self.branches(step)]

    @property
    def evaluations(self) -> int:
        """Predictions of a window in all steps."""
        return sum(len(self.branches(step)) for step in range(self.steps))


# windows [B n, C, f, H, W], frames [n, f], branch of every window, step -> predictions like windows
BranchModel = Callable[[Tensor, Tensor, tuple[Branch, ...], int], Tensor]


def guided_predict(
    guidance: Guidance, model: BranchModel, batched: bool = True
) -> Callable[[Tensor, Tensor, int], list[Tensor]]:
    """`predict` of `long_video.denoise` for a model that is asked branch by branch.

    Args:
        guidance: says which branches a step needs; its `coefficients` go to `denoise` beside this.
        model: called as ``model(windows, frames, branches, step)``: windows [B n, C, f, H, W] of B branches, those of a
            branch side by side, frames [n, f] and the B branches; gives the predictions, of the windows' shape.
        batched: all branches in one call; False makes one call each, which takes less memory and more time.

    Returns:
        A function that gives B tensors of the shape of the window, for one window or a batch of windows.
    """

    def predict(window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
        one = window.dim() == 4
        windows, at = (window[None], frames[None]) if one else (window, frames)
        branches = guidance.branches(step)
        groups = [branches] if batched else [(branch,) for branch in branches]
        found: list[Tensor] = []
        for group in groups:
            shown = windows.repeat(len(group), 1, 1, 1, 1) if len(group) > 1 else windows
            found += model(shown, at, group, step).split(len(windows))
        return [prediction[0] for prediction in found] if one else found

    return predict


@dataclass(frozen=True)
class Hybrid(Generic[T]):
    """Hybrid inference (SkyReels-Audio, equation 4): a video conditions the first steps, its first frame the rest.

    The first steps keep the structure of the source, the others let the lips follow the voice. What is conditioned
    on, the latents with their mask, is the caller's.

    Args:
        video: conditions of the first steps.
        image: conditions of the others.
        first: how many steps are the first, N.
    """

    video: T
    image: T
    first: int

    def __call__(self, step: int) -> T:
        return self.video if step < self.first else self.image


def rescale_factors(predictions: Sequence[Tensor], weights: Sequence[float], rescale: float) -> Tensor:
    """What rescaled guidance multiplies the guided velocity with, for every window.

    The guided velocity is given back the spread of the conditioned one (Lin et al., arXiv:2305.08891, section 3.4):
    phi std(v_ta) / std(v) + 1 - phi with phi = `rescale`. The spread of the sum follows from the covariances of the
    predictions, so that the sum itself is not made here.

    Args:
        predictions: K tensors [n, C, f, H, W]; the first is the conditioned one.
        weights: K of them.
        rescale: phi, 0 to 1.

    Returns:
        [n] float64 on the device of the predictions, which is not waited for.
    """
    wide = torch.stack([p.flatten(1) for p in predictions]).to(torch.promote_types(predictions[0].dtype, torch.float32))
    wide = wide - wide.mean(dim=2, keepdim=True)
    covariance = torch.einsum("knm,lnm->nkl", wide, wide).double() / wide.shape[2]
    row = torch.tensor(list(weights), dtype=torch.float64, device=wide.device)
    guided = (row @ covariance @ row).clamp(min=0).sqrt()
    conditioned = covariance[:, 0, 0].clamp(min=0).sqrt()
    ratio = torch.where(guided > 0, conditioned / guided, torch.ones_like(guided))
    return rescale * ratio + (1 - rescale)


def guided_step(x: Tensor, predictions: Tensor, weights: Sequence[float], step: float) -> Tensor:
    """One Euler step along the guided velocity: x + step * sum_k weights[k] predictions[k].

    Args:
        x: [1, C, T, H, W] latents, float32.
        predictions: [K, C, T, H, W], one per branch, float32 or lower precision.
        weights: K weights.
        step: difference of noise levels, negative when denoising.

    Returns:
        [1, C, T, H, W], float32.
    """
    rates = [1.0, *(step * weight for weight in weights)]
    whole = torch.ones(1, x.shape[2], device=x.device)  # one window, which covers all frames
    return ops.fused_window_step(x[0], predictions[:, None], rates, [0], whole)[None]
