# SPDX-License-Identifier: Apache-2.0
"""What a video is made from, and what a denoising step needs of it that does not depend on the timestep."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from talkingdit.families.hunyuan_avatar.audio import VoiceMemory
from talkingdit.families.hunyuan_avatar.emotion import KeyValue, SceneTokens
from talkingdit.families.hunyuan_avatar.rope import Layouts
from talkingdit.families.hunyuan_avatar.sequence import SequenceShard

# What the released program says of every video.
MOTION_EXP, MOTION_POSE, FPS = 30.0, 25.0, 25.0


@dataclasses.dataclass(frozen=True, eq=False)
class AvatarInputs:
    """The inputs of `HunyuanAvatarModel.encode_conditions`. S speakers, E pictures of emotions, T latent frames.

    Args:
        text: [B, L, text_states_dim] features of a language model.
        text_mask: bool or int [B, L], true for real tokens; None for all. The others are left out of the sequence; see
            `talkingdit.families.hunyuan_avatar.text_refiner.used_text` for padding that is not all behind.
        pooled_text: [B, text_states_dim_2]; None for zeros.
        reference: [B, in_channels, T, H, W] latents of the picture repeated over time, or of one frame, [.., 1, H, W],
            which is repeated. None for no character.
        audio: voices [B, S, 4 T - 3, window, blocks, channels], features for every video frame; without the axis of
            speakers for one. S may be zero. None for no voice at all; silence is a voice of zeros.
        face_mask: [B, S, 1 or T, H, W] in 0..1, where each speaker's face is; None for everywhere. Of faces that
            overlap, masks are scaled down so that no token hears more than one voice's worth.
        strength: [B, S], how much each is heard; or one number.
        emotion: [B, E, in_channels, 1, H', W'] latents of pictures; None for none.
        emotion_index: [B, T], the picture that each latent frame follows, -1 for none; None is the first one.
        emotion_strength: [B, E], or one number.
        motion_exp, motion_pose: [B, 4], how much face and head move; None for what the released program says.
        fps: [B] frames per second; None for 25.
        size: (T, H, W) of the latents, where conditions are encoded without latents and no reference of T frames tells.
    """

    text: Tensor
    text_mask: Tensor | None = None
    pooled_text: Tensor | None = None
    reference: Tensor | None = None
    audio: Tensor | None = None
    face_mask: Tensor | None = None
    strength: Tensor | float | None = None
    emotion: Tensor | None = None
    emotion_index: Tensor | Sequence[Sequence[int]] | None = None
    emotion_strength: Tensor | float | None = None
    motion_exp: Tensor | None = None
    motion_pose: Tensor | None = None
    fps: Tensor | None = None
    size: tuple[int, int, int] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AvatarInputs:
        """With all tensors on a device. Hooks of offloading move what a model is given by this method."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True)
class AvatarConditions:
    """Everything a step needs that does not depend on the timestep, made by `HunyuanAvatarModel.encode_conditions`.

    What belongs to tokens is there for those that this process holds (`shard`). A packed sequence is a batch of one,
    with the frames of its clips behind each other and a text for each clip.
    """

    shard: SequenceShard
    layouts: Layouts
    text: Tensor  # features for the refiner [B or clips, L, text_dim]
    text_mask: Tensor | None  # bool [B or clips, L], true for real tokens; None for all
    vec: Tensor  # [B or clips, dim] float32: all of the vector of a step but its timestep
    reference: tuple[Tensor, ...]  # per clip, tokens of the reference that are here [B, n, dim]
    added: tuple[Tensor | None, ...]  # per clip, added to the video tokens that are here [B, n, dim]
    channels: tuple[Tensor | None, ...]  # per clip, latents that lie behind the channels of the noisy ones
    lengths: tuple[int, ...] | None = None  # tokens of each sample of a batch, where they differ
    key_mask: Tensor | None = None  # bool [B, N], the same
    audio: Tensor | None = None  # [B, P, F, A, dim], of the frames that video tokens are in; None without voices
    audio_weights: Tensor | None = None  # [B, P, n] of the video tokens here
    audio_memory: tuple[VoiceMemory, ...] | None = None  # per adapter
    emotion: Tensor | None = None  # [B or clips, E, n, dim]
    emotion_strength: Tensor | None = None  # [B or clips, E]
    emotion_scenes: tuple[SceneTokens, ...] = ()
    emotion_memory: tuple[KeyValue, ...] | None = None  # per adapter
    idle_audio: Tensor | None = None  # [B, 1, 1, A, dim], for layers that must run although nobody speaks
    idle_emotion: Tensor | None = None  # [B, 1, 1, dim], likewise

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, patch rows and patch columns of the video, where there is one."""
        return self.shard.clips[0].grid

    @property
    def batch(self) -> int:
        """Samples behind each other along the first axis."""
        return 1 if self.shard.packed else self.text.shape[0]
