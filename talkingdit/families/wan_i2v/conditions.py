# SPDX-License-Identifier: Apache-2.0
"""What a denoising step of Wan I2V needs besides the noisy latents, and where its tokens are."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from talkingdit.families.wan_s2v.conditions import KeyValue
from talkingdit.families.wan_s2v.rope import head_split
from talkingdit.families.wan_s2v.sequence import SequenceShard
from talkingdit.ops import RopeLayout, Segment

# Of extra tokens: places in time of their latent frames, patch rows and columns.
Place = tuple[tuple[float, ...], int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class ExtraTokens:
    """Clean latent frames of any size that take part in self-attention, at places in time of their own.

    They are patchified by the layer of the video, as frames that are known: see `WanI2VModel.known`.

    Args:
        latents: [B, out_dim, T, H, W]; H and W even.
        times: of the T frames, counted in latent frames from the beginning of the video; any numbers.
        drop: samples that do not have them, True for all; their tokens are hidden from attention.
    """

    latents: Tensor
    times: Sequence[float]
    drop: bool | Sequence[bool] | Tensor = False

    @property
    def place(self) -> Place:
        """Times, patch rows and columns."""
        return tuple(float(time) for time in self.times), self.latents.shape[3] // 2, self.latents.shape[4] // 2

    @property
    def tokens(self) -> int:
        times, rows, columns = self.place
        return len(times) * rows * columns


@dataclasses.dataclass(frozen=True, eq=False)
class WanI2VInputs:
    """What a video is made from: the inputs of `WanI2VModel.encode_conditions`.

    Args:
        text: [B, L, text_dim] with L <= text_len, padded with zeros to text_len.
        condition: [B, in_dim - out_dim, T, H, W], put behind the channels of the noisy latents: a mask of 4 channels
            and latents of what is known, see `talkingdit.families.wan_i2v.frames`. None is zeros: nothing is known.
        image: [B, L, image_dim] features of a picture; None is zeros.
        extra: clean tokens beside the video's.
        audio: features as the family's `encode_audio` takes them; None is silence.
        text_mask: bool [B, L], true for real tokens, to leave padding out; None attends all text_len tokens.
        lengths: latent frames of each sample, a list or a tensor [B]; frames behind are padding that no other token
            sees, and what comes out there means nothing. None: all have T.
        size: (T, H, W) of the latents. Needed only where conditions are encoded without latents and without condition.
    """

    text: Tensor
    condition: Tensor | None = None
    image: Tensor | None = None
    extra: tuple[ExtraTokens, ...] = ()
    audio: Tensor | None = None
    text_mask: Tensor | None = None
    lengths: Sequence[int] | Tensor | None = None
    size: tuple[int, int, int] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> WanI2VInputs:
        """With all tensors on a device. Hooks of offloading move what a model is given by this method."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        extra = tuple(
            dataclasses.replace(one, latents=one.latents.to(device, non_blocking=non_blocking)) for one in self.extra
        )
        return dataclasses.replace(self, extra=extra, **moved)


@dataclasses.dataclass(frozen=True)
class WanI2VConditions:
    """Everything a denoising step needs that does not depend on the timestep, made by `encode_conditions`.

    The sequence of a clip is [noisy | extra]. What belongs to tokens is there for those that this process holds
    (`shard`). A packed sequence is a batch of one, with a text, a picture and audio for each clip.
    """

    layout: RopeLayout  # places of all N tokens
    shard: SequenceShard
    condition: tuple[Tensor, ...]  # per clip: [B, in_dim - out_dim, T, H, W]
    clean: tuple[Tensor, ...]  # per clip: extra tokens [B, n, dim]
    text: Tensor  # [B, L, dim]; packed: of the clips that have tokens here
    image: Tensor | None = None  # [B, L, dim], likewise
    audio: Tensor | None = None  # [B, F, ...], of the frames that noisy tokens are in
    text_mask: Tensor | None = None  # bool [B, L]
    key_mask: Tensor | None = None  # bool [B, N]: false where a sample does not have a token
    text_kv: tuple[KeyValue, ...] | None = None  # per block: k, v [B, L, H, D]
    image_kv: tuple[KeyValue, ...] | None = None

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, patch rows and patch columns of the video, where there is one."""
        return self.shard.clips[0].grid


def clip_layout(grid: tuple[int, int, int], extra: Sequence[Place], head_dim: int) -> RopeLayout:
    """Places of the sequence [noisy | extra] of a clip.

    Args:
        grid: latent frames, patch rows and columns of the video.
        extra: of every group of extra tokens.
        head_dim: channels per head.
    """
    if torch.compiler.is_compiling():
        from talkingdit.families.wan_s2v.traced_rope import TracedLayout  # not before: it imports the compiler

        frames, rows, columns = (operator.index(size) for size in grid)
        return TracedLayout(_layout_of, head_dim, (frames, rows, columns), tuple(extra), head_dim)
    return _layout(grid, tuple(extra), head_dim)


@functools.lru_cache(maxsize=64)
def _layout(grid: tuple[int, int, int], extra: tuple[Place, ...], head_dim: int) -> RopeLayout:
    frames, rows, columns = grid
    segments = [Segment(range(frames), range(rows), range(columns))]
    segments += [Segment(list(times), range(high), range(wide)) for times, high, wide in extra]
    return RopeLayout(segments, split=head_split(head_dim))


def _layout_of(*place: Any) -> RopeLayout:
    """`_layout` as the compiler can hold it, see `wan_s2v.rope.layout_of`."""
    return _layout(*place)
