# SPDX-License-Identifier: Apache-2.0
"""What voices and emotions add to the video tokens behind every second double block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from talkingdit.families.hunyuan_avatar.conditions import AvatarConditions
from talkingdit.nn.audio_cross_attention import TokenSpan
from talkingdit.nn.ranges import scatter_ranges, take_ranges

if TYPE_CHECKING:
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel


def hear(model: HunyuanAvatarModel, index: int, image: Tensor, conditions: AvatarConditions) -> Tensor:
    """Image tokens [B, n, dim] with what voices and emotions add to the video's; without gradients in place."""
    ranges, trains = conditions.shard.video_ranges, torch.is_grad_enabled()
    video = before = take_ranges(image, ranges)
    video = _voices(model, index, video, conditions, inplace=not trains)
    if model.emotion_adapter_blocks is not None:
        video = _emotions(model, index, video, conditions)
    if video is before and len(ranges) == 1:  # unchanged, or in place
        return image
    if trains:
        return image + scatter_ranges(video - before, ranges, image.shape[1])
    if len(ranges) > 1:
        for (begin, end), part in zip(ranges, video.split([b - a for a, b in ranges], 1), strict=True):
            image[:, begin:end] = part
    elif video is not before:
        before.copy_(video)
    return image


def _voices(
    model: HunyuanAvatarModel, index: int, video: Tensor, conditions: AvatarConditions, inplace: bool
) -> Tensor:
    adapter, absorb = model.audio_adapter_blocks[index], model.config.audio_absorb
    if conditions.audio is None:
        if conditions.idle_audio is None:
            return video
        nothing = video.new_zeros(video.shape[0], 1, 0, dtype=torch.float32)
        spans: tuple[TokenSpan, ...] = (TokenSpan(0, 1, 1),)
        ran = model.run_layer(adapter, video[:, :0], conditions.idle_audio, nothing, spans, None, absorb, False)
        return torch.cat([video, ran], dim=1)
    memory = None if conditions.audio_memory is None else conditions.audio_memory[index]
    audio = conditions.audio if memory is None else None
    spans, weights = conditions.shard.frame_spans, conditions.audio_weights
    return model.run_layer(adapter, video, audio, weights, spans, memory, absorb, inplace)


def _emotions(model: HunyuanAvatarModel, index: int, video: Tensor, conditions: AvatarConditions) -> Tensor:
    assert model.emotion_adapter_blocks is not None
    adapter = model.emotion_adapter_blocks[index]
    if conditions.emotion is None:
        if conditions.idle_emotion is None:
            return video
        strength = video.new_zeros(video.shape[0], 1, dtype=torch.float32)
        return model.run_layer(adapter, video, conditions.idle_emotion, strength, (), None)
    memory = None if conditions.emotion_memory is None else conditions.emotion_memory[index]
    emotion = conditions.emotion if memory is None else None
    return model.run_layer(adapter, video, emotion, conditions.emotion_strength, conditions.emotion_scenes, memory)
