# SPDX-License-Identifier: Apache-2.0
"""The timestep in a step of a Wan model: tokens in groups, each modulated as its timestep says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from talkingdit.families.wan_s2v.blocks import Groups
from talkingdit.families.wan_s2v.packed import MAX_GROUPS
from talkingdit.families.wan_s2v.sequence import ClipSpan

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.trunk import WanTrunk


@dataclass(frozen=True)
class StepTime:
    """Embeddings of the timesteps of a step, by groups of tokens."""

    modulation: Tensor  # [B, G, 6, dim] float32, for the blocks
    groups: Groups  # of the tokens of the whole sequence
    head: Tensor  # [B, G', dim] float32, for the head
    head_groups: Groups  # of the noisy tokens alone, those of all clips behind each other


def clip_time(model: WanTrunk, timestep: Tensor, clip: ClipSpan) -> StepTime:
    """For a sequence of one clip; the groups are its noisy tokens and, at timestep 0, the rest.

    With a timestep per latent frame every frame is a group, and as many groups at 0 follow as the rest needs.

    Args:
        timestep: [B], or [B, T], one per latent frame.

    Raises:
        ValueError: a timestep per latent frame in a model without `zero_timestep`.
    """
    per_sample = timestep.dim() == 1
    steps = timestep[:, None] if per_sample else timestep
    with_zero = clip.tokens > clip.noisy and model.config.zero_timestep
    if clip.tokens > clip.noisy and not with_zero and not per_sample:
        raise ValueError(
            f"{type(model).__name__}: a timestep per latent frame needs zero_timestep, got a model without it"
        )
    if with_zero:
        steps = torch.cat([steps, torch.zeros_like(steps[:, :1])], dim=1)
    time, modulation = model.embed_time(steps)
    if per_sample:
        return StepTime(modulation, [clip.noisy, clip.tokens] if with_zero else [clip.tokens], time[:, :1], clip.noisy)
    if with_zero:
        more = -(-(clip.tokens - clip.noisy) // clip.per_frame) - 1
        modulation = torch.cat([modulation, modulation[:, -1:].expand(-1, more, -1, -1)], dim=1)
    return StepTime(modulation, clip.per_frame, time[:, : clip.grid[0]], clip.per_frame)


def packed_time(model: WanTrunk, timesteps: Sequence[Tensor], clips: Sequence[ClipSpan]) -> StepTime:
    """For packed clips. Other than noisy tokens are at timestep 0, or with `zero_timestep` off at that of their clip.

    Args:
        timesteps: of each clip, [] or [T].

    Raises:
        ValueError: more groups than the kernels tell apart, or a timestep per latent frame without `zero_timestep`.
    """
    at_zero = model.config.zero_timestep and any(clip.tokens > clip.noisy for clip in clips)
    steps = [timestep.reshape(-1) for timestep in timesteps]
    time, modulation = model.embed_time(torch.cat([*steps, steps[0].new_zeros(1)] if at_zero else steps)[None])
    rows: list[Tensor] = []
    ends: list[int] = []
    head_ends: list[int] = []
    used = noisy = 0
    for i, (step, clip) in enumerate(zip(steps, clips, strict=True)):
        each = clip.noisy // len(step)
        rows.append(modulation[:, used : used + len(step)])
        ends += range(clip.begin + each, clip.begin + clip.noisy + 1, each)
        head_ends += range(noisy + each, noisy + clip.noisy + 1, each)
        used, noisy = used + len(step), noisy + clip.noisy
        if clip.tokens == clip.noisy:
            continue
        if at_zero:
            rows.append(modulation[:, -1:])
            ends.append(clip.begin + clip.tokens)
        elif len(step) == 1:
            ends[-1] = clip.begin + clip.tokens
        else:
            raise ValueError(
                f"{type(model).__name__}: a timestep per latent frame needs zero_timestep, got a model without it "
                f"(packed clip {i})"
            )
    if len(ends) > MAX_GROUPS:
        raise ValueError(
            f"{type(model).__name__}: packed clips must have at most {MAX_GROUPS} groups of tokens with a timestep "
            f"of their own (two per clip), got {len(ends)} of {len(clips)} clips"
        )
    return StepTime(torch.cat(rows, dim=1), ends, time[:, :used], head_ends)
