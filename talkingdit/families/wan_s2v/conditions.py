# SPDX-License-Identifier: Apache-2.0
"""What a denoising step of Wan-S2V needs besides the noisy latents, and where its tokens are."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from talkingdit.families.wan_s2v.rope import Packing, layout_at, layout_of
from talkingdit.families.wan_s2v.sequence import SequenceShard
from talkingdit.nn.audio_cross_attention import AudioMemory
from talkingdit.ops import RopeLayout

KeyValue = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class WanConditions:
    """Everything a denoising step needs that does not depend on the timestep, made by `WanS2VModel.encode_conditions`.

    N is the length of the whole sequence [noisy | reference | history], F latent frames, A audio tokens per frame. What
    belongs to tokens is there for those that this process holds (`shard`): all of them without context parallelism. A
    packed sequence is a batch of one, with the frames of its clips behind each other and a text for each clip.
    """

    layout: RopeLayout  # places of all N tokens
    shard: SequenceShard
    clean: tuple[Tensor, ...]  # per clip: reference and history tokens [B, n, dim]
    text: Tensor  # [B, L, dim]; packed: of the clips that have tokens here
    pose: tuple[Tensor | None, ...]  # per clip: [B, n, dim], added to the noisy tokens
    audio: Tensor | None = None  # [B, F, A, dim], of the frames that noisy tokens are in
    audio_modulation: tuple[KeyValue | None, ...] = ()  # per injection: shift, scale [B, F, dim]
    text_mask: Tensor | None = None  # bool [B, L]
    key_mask: Tensor | None = None  # bool [B, N]: false where a sample does not have a token
    text_kv: tuple[KeyValue, ...] | None = None  # per block: k, v [B, L, H, D]
    audio_kv: tuple[AudioMemory, ...] | None = None  # per injection

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, patch rows and patch columns of the video, where there is one."""
        return self.shard.clips[0].grid


@dataclasses.dataclass(frozen=True, eq=False)
class WanInputs:
    """What a video is made from: the inputs of `WanS2VModel.encode_conditions`.

    Args:
        text: [B, L, text_dim] with L <= text_len, padded with zeros to text_len.
        reference: [B, in_dim, 1, H, W] latent of the reference image, or None for no reference tokens.
        history: [B, in_dim, Th, H, W] latents that precede the clip, the newest last, or None. Packed history uses the
            last sum(zip_frame_buckets) frames; fewer are continued to the past by zeros.
        drop_history: True takes the history tokens away; per sample as a list or a bool tensor [B] it hides them from
            attention, which gives the same result.
        drop_reference: the same for the reference.
        add_last_motion: 2 uses all of the packed history, 1 not its newest bucket, 0 not its newest two; what that
            means is up to framepack_drop_mode.
        pose: [B, cond_dim, T, H, W] latents of a pose video, or None.
        audio: [B, audio_layers, audio_dim, 4 T] speech features, four per latent frame; None is silence (zeros).
        audio_history: [B, audio_layers, audio_dim, n] features just before the clip. Without them the first feature is
            taken to have lasted, as the official program does.
        text_mask: bool [B, L], true for real tokens, to leave padding out; None attends all text_len tokens.
        lengths: latent frames of each sample, a list or a tensor [B]; frames behind are padding that no other token
            sees, and what comes out there means nothing. None: all have T.
        history_lengths: latent frames of history of each sample, likewise, the newest last; frames in front are
            padding. A packed history is continued by zeros from there.
        size: (T, H, W) of the latents. Needed only where conditions are encoded without latents, and neither reference,
            history nor pose tells H and W or neither audio nor pose tells T.
    """

    text: Tensor
    reference: Tensor | None = None
    history: Tensor | None = None
    drop_history: bool | Sequence[bool] | Tensor = False
    drop_reference: bool | Sequence[bool] | Tensor = False
    add_last_motion: int = 2
    pose: Tensor | None = None
    audio: Tensor | None = None
    audio_history: Tensor | None = None
    text_mask: Tensor | None = None
    lengths: Sequence[int] | Tensor | None = None
    history_lengths: Sequence[int] | Tensor | None = None
    size: tuple[int, int, int] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> WanInputs:
        """With all tensors on a device. Hooks of offloading move what a model is given by this method."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)


def sequence_layout(
    grid: tuple[int, int, int],
    head_dim: int,
    reference_time: float | None = None,
    past: int | Packing | None = None,
) -> RopeLayout:
    """Places of the sequence [noisy | reference | history].

    Args:
        grid: latent frames, patch rows and columns of the video.
        head_dim: channels per head; height and width get head_dim / 6 pairs each (rounded down), time the rest.
        reference_time: place of the reference in time, None where there is none.
        past: latent frames of a history that is not packed, or (buckets, drop_mode, padding, add_last_motion) of a
            `FramePacker`, or None.
    """
    if torch.compiler.is_compiling():
        # Not before: its decorators import the compiler, which takes longer than all of torch.
        from talkingdit.families.wan_s2v.traced_rope import TracedLayout

        frames, rows, columns = (operator.index(size) for size in grid)
        return TracedLayout(layout_of, head_dim, (frames, rows, columns), head_dim, reference_time, past)
    return layout_at(grid, head_dim, reference_time, past)


def samples_without(
    name: str, drop: bool | Sequence[bool] | Tensor, batch: int, device: torch.device | str
) -> bool | Tensor:
    """True or False where that holds for all samples and is known on the host, else a bool tensor [B]."""
    if isinstance(drop, bool):
        return drop
    if not isinstance(drop, Tensor):
        if len(drop) == batch and (all(drop) or not any(drop)):
            return bool(drop[0])
        drop = torch.tensor(list(drop), dtype=torch.bool)
    if drop.shape != (batch,) or drop.dtype != torch.bool:
        raise ValueError(
            f"WanS2VModel: {name} must be a bool or one bool per sample ({batch}), "
            f"got {drop.dtype} of shape {tuple(drop.shape)}"
        )
    return drop.to(device)


def present_frames(
    name: str, lengths: Sequence[int] | Tensor | None, batch: int, frames: int, device: torch.device | str
) -> Tensor | None:
    """bool [B, frames], true for the first `lengths` frames of each sample; None where all have all."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        if not all(0 <= length <= frames for length in lengths):
            raise ValueError(f"WanS2VModel: {name} must be numbers of frames up to {frames}, got {list(lengths)}")
        lengths = torch.tensor(list(lengths), dtype=torch.long)
    if lengths.shape != (batch,):
        raise ValueError(f"WanS2VModel: {name} must have one number per sample ({batch}), got {list(lengths.shape)}")
    return torch.arange(frames, device=device) < lengths.to(device)[:, None]


def key_mask(parts: Sequence[tuple[int, bool | Tensor]], batch: int, device: torch.device | str) -> Tensor | None:
    """Which tokens each sample has, bool [B, N]; None where every sample has all.

    Args:
        parts: number of tokens, and where they are missing: False, per sample [B] or per frame [B, frames].
    """
    if all(missing is False for _, missing in parts):
        return None
    columns = []
    for count, missing in parts:
        if isinstance(missing, bool):
            kept = torch.ones(batch, 1, dtype=torch.bool, device=device)
        else:
            kept = ~missing if missing.dim() == 2 else ~missing[:, None]
        columns.append(kept.repeat_interleave(count // kept.shape[1], dim=1))
    return torch.cat(columns, dim=1)
