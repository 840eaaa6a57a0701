# SPDX-License-Identifier: Apache-2.0
"""The timesteps of packed clips of Wan I2V: tokens in groups, each modulated as its timestep says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from talkingdit.families.wan_s2v.packed import MAX_GROUPS
from talkingdit.families.wan_s2v.sequence import ClipSpan
from talkingdit.families.wan_s2v.timesteps import StepTime

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.trunk import WanTrunk


def packed_time(
    model: WanTrunk, timesteps: Sequence[Tensor], held: Sequence[int], clips: Sequence[ClipSpan]
) -> StepTime:
    """Groups of a clip: its first `held` latent frames at timestep 0, its other ones, and extra tokens at 0.

    Args:
        timesteps: of each clip, [] or [T].
        held: of each clip; 0 where the timestep is [T], which says all.

    Raises:
        ValueError: more groups than the kernels tell apart.
    """
    rows: list[Tensor] = []
    ends: list[int] = []
    head_ends: list[int] = []
    noisy = 0
    for step, known, clip in zip(timesteps, held, clips, strict=True):
        parts = _parts(step, known, clip)
        rows += [row for row, _ in parts]
        ends += [clip.begin + end for _, end in parts]
        head_ends += [noisy + end for _, end in parts]
        noisy += clip.noisy
        if clip.tokens > clip.noisy:
            rows.append(step.new_zeros(()) if model.config.zero_timestep else step.flatten()[-1])
            ends.append(clip.begin + clip.tokens)
            head_ends.append(noisy)  # none of the head's
    if len(ends) > MAX_GROUPS:
        raise ValueError(
            f"{type(model).__name__}: packed clips must have at most {MAX_GROUPS} groups of tokens with a timestep "
            f"of their own (three per clip), got {len(ends)} of {len(clips)} clips"
        )
    time, modulation = model.embed_time(torch.stack(rows).float()[None])
    return StepTime(modulation, ends, time, head_ends)


def _parts(step: Tensor, held: int, clip: ClipSpan) -> list[tuple[Tensor, int]]:
    """Timesteps of the noisy tokens of a clip, and where those of each end."""
    if step.dim():
        return [(one, (i + 1) * clip.per_frame) for i, one in enumerate(step.unbind())]
    parts = [(step, clip.noisy)] if held < clip.grid[0] else []
    return [(step.new_zeros(()), held * clip.per_frame), *parts] if held else parts
