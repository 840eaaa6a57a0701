# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance with separate strengths for text and audio, as a weighted sum of model predictions.

With v(text, audio) the prediction given (t, a) or denied (0) a condition,

    v = v_00 + g_text (v_t0 - v_00) + g_audio (v_ta - v_t0)
      = (1 - g_text) v_00 + (g_text - g_audio) v_t0 + g_audio v_ta

A prediction with weight zero is not computed: strengths (1, 1) cost one evaluation, (1, g) two, (g, g) two, else three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from talkingdit import ops


@dataclass(frozen=True)
class Branch:
    """One prediction of the sum: which conditions it is given, and its weight."""

    text: bool
    audio: bool
    weight: float


def guidance_branches(text: float, audio: float) -> tuple[Branch, ...]:
    """The predictions that guidance of these strengths needs; their weights sum to one.

    Args:
        text: strength of the prompt; 1 is none beyond the condition itself, 0 ignores the prompt.
        audio: strength of the voice, likewise.

    Raises:
        ValueError: a strength is negative or not finite.
    """
    for name, value in (("text", text), ("audio", audio)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"guidance: {name} guidance must be a number of at least 0, got {value}")
    branches = (
        Branch(text=True, audio=True, weight=audio),
        Branch(text=True, audio=False, weight=text - audio),
        Branch(text=False, audio=False, weight=1.0 - text),
    )
    return tuple(branch for branch in branches if branch.weight != 0.0)


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
