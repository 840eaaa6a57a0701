# SPDX-License-Identifier: Apache-2.0
"""Clips of any sizes in one sequence of HunyuanVideo-Avatar, each a sample of its own: training without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.families.hunyuan_avatar.audio import fold_frames
from talkingdit.families.hunyuan_avatar.checks import check_latents, clip_size, speakers_of
from talkingdit.families.hunyuan_avatar.conditions import AvatarConditions, AvatarInputs
from talkingdit.families.hunyuan_avatar.emotion import SceneTokens, scenes_of
from talkingdit.families.hunyuan_avatar.encode import (
    clip_span,
    emotion_rows,
    emotions,
    heard_by,
    idle,
    picture_tokens,
    step_vector,
    vector_inputs,
)
from talkingdit.families.hunyuan_avatar.rope import layouts
from talkingdit.families.hunyuan_avatar.sequence import MAX_CLIPS, ClipSpan, SequenceShard, sequence_shard
from talkingdit.families.hunyuan_avatar.text_refiner import used_text

if TYPE_CHECKING:
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel
    from talkingdit.nn.context_parallel import ContextParallel


@dataclass(frozen=True)
class PackedClip:
    """A sample of a packed sequence. Everything is as in `AvatarInputs`, without the batch axis."""

    latents: Tensor  # [in_channels, T, H, W]
    timestep: Tensor  # [] in 0..1000
    text: Tensor  # [L, text_states_dim]
    text_mask: Tensor | None = None  # [L]
    pooled_text: Tensor | None = None  # [text_states_dim_2]
    reference: Tensor | None = None  # [in_channels, 1 or T, H, W]
    audio: Tensor | None = None  # [S, 4 T - 3, window, blocks, channels], or without S
    face_mask: Tensor | None = None  # [S, 1 or T, H, W]
    strength: Tensor | None = None  # [S]
    emotion: Tensor | None = None  # [E, in_channels, 1, H', W'], the same size in all clips of a sequence
    emotion_index: Tensor | None = None  # [T]
    emotion_strength: Tensor | None = None  # [E]
    motion_exp: Tensor | None = None  # [4]
    motion_pose: Tensor | None = None  # [4]
    fps: Tensor | None = None  # []

    def inputs(self) -> AvatarInputs:
        """What the clip is made from, with a batch axis."""
        names = {field.name for field in fields(self)} - {"latents", "timestep"}
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        return AvatarInputs(**{name: value[None] for name, value in given.items() if value is not None})


def encode_packed(
    model: HunyuanAvatarModel, clips: Sequence[PackedClip], context: ContextParallel | None
) -> AvatarConditions:
    """The conditions of all clips, behind each other in one sequence of a batch of one.

    Every layer that is a unit of sharding runs once, on what all clips have for it.

    Raises:
        ValueError: for no clip, too many, or one that does not fit; the message names it.
    """
    if not 0 < len(clips) <= MAX_CLIPS:
        raise ValueError(f"HunyuanAvatarModel: denoise_packed must be given 1 to {MAX_CLIPS} clips, got {len(clips)}")
    config = model.config
    given = [clip.inputs() for clip in clips]
    spans: list[ClipSpan] = []
    texts = []
    for number, (clip, inputs) in enumerate(zip(clips, given, strict=True)):
        frames, height, width = _checked(model, clip, inputs, number)
        texts.append(used_text(inputs.text, inputs.text_mask))
        begin = spans[-1].begin + spans[-1].tokens if spans else 0
        length = max(1, texts[-1][2][0])
        spans.append(clip_span(config, (frames, height, width), inputs.reference is not None, length, begin))
    shard = sequence_shard(spans, context, packed=True)
    pictures = [
        picture_tokens(model, inputs, span, reference, video)
        for inputs, span, reference, video in zip(given, spans, shard.reference, shard.video, strict=True)
    ]
    vectors = [torch.cat(parts) for parts in zip(*(vector_inputs(config, inputs) for inputs in given), strict=True)]
    text, text_mask = _stacked_texts([text for text, _, _ in texts], [mask for _, mask, _ in texts])
    audio, weights = _voices(model, given, shard)
    emotion, strength, scenes = _emotions(model, given, shard)
    idled = idle(model, 1, audio, emotion)
    return AvatarConditions(
        shard=shard,
        layouts=layouts(config, spans),
        text=text,
        text_mask=text_mask,
        vec=step_vector(model, *vectors),
        reference=tuple(tokens for tokens, _ in pictures),
        added=tuple(added for _, added in pictures),
        channels=tuple(inputs.reference if config.reference_channels else None for inputs in given),
        audio=audio,
        audio_weights=weights,
        emotion=emotion,
        emotion_strength=strength,
        emotion_scenes=scenes,
        **idled,
    )


def _checked(model: HunyuanAvatarModel, clip: PackedClip, inputs: AvatarInputs, number: int) -> tuple[int, int, int]:
    """(T, H, W) of a clip that fits."""
    try:
        check_latents(model.config, clip.latents[None], clip.timestep[None])
        _, frames, height, width = clip.latents.shape
        return clip_size(model.config, inputs, (frames, height, width))
    except ValueError as error:
        raise ValueError(f"{error} (packed clip {number})") from None


def _stacked_texts(texts: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Texts [1, L, text_dim] as a batch with padding, and its mask, None where there is no padding."""
    longest = max(text.shape[1] for text in texts)
    stacked = torch.cat([F.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts])
    if all(mask is None for mask in masks) and all(text.shape[1] == longest for text in texts):
        return stacked, None
    rows = []
    for text, mask in zip(texts, masks, strict=True):
        row = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask
        rows.append(F.pad(row, (0, longest - text.shape[1])))
    return stacked, torch.cat(rows)


def _voices(
    model: HunyuanAvatarModel, given: Sequence[AvatarInputs], shard: SequenceShard
) -> tuple[Tensor | None, Tensor | None]:
    """Audio tokens [1, P, F, A, dim] of the latent frames here, and weights [1, P, n] of the video tokens here.

    Where a clip has fewer speakers than another, those that it lacks weigh nothing.
    """
    speakers = [speakers_of(inputs) for inputs in given]
    most = max(speakers)
    if most == 0:
        return None, None
    features = [
        inputs.audio if inputs.audio is None or inputs.audio.dim() == 6 else inputs.audio[:, None] for inputs in given
    ]
    flat = [feature.flatten(0, 2) for feature in features if feature is not None and feature.shape[1]]
    made = iter(model.audio_proj(torch.cat(flat)).split([len(part) for part in flat]))
    tokens, weights = [], []
    for number, (inputs, clip, count) in enumerate(zip(given, shard.clips, speakers, strict=True)):
        first, last = shard.frames[number]
        begin, end = shard.video[number]
        folded = fold_frames(next(made).unflatten(0, (1, count, -1))) if count else None
        if folded is None:
            weight = model.img_in.proj.weight
            per_latent = 4 * model.config.audio_tokens
            folded = weight.new_zeros(1, 0, clip.grid[0], per_latent, model.config.hidden_size)
            heard = torch.zeros(1, 0, clip.video, device=weight.device)
        else:
            heard = heard_by(inputs, count, clip, folded.device)
        tokens.append(F.pad(folded[:, :, first:last], (0, 0, 0, 0, 0, 0, 0, most - count)))
        weights.append(F.pad(heard[:, :, begin:end], (0, 0, 0, most - count)))
    return torch.cat([part.to(tokens[0].dtype) for part in tokens], dim=2), torch.cat(weights, dim=2)


def _emotions(
    model: HunyuanAvatarModel, given: Sequence[AvatarInputs], shard: SequenceShard
) -> tuple[Tensor | None, Tensor | None, tuple[SceneTokens, ...]]:
    """References [1, E, n, dim] of all clips, their strengths [1, E], and which tokens follow which."""
    sizes = {tuple(inputs.emotion.shape[-2:]) for inputs in given if inputs.emotion is not None}
    if len(sizes) > 1:
        raise ValueError(f"HunyuanAvatarModel: emotions of packed clips must have one size, got {sorted(sizes)}")
    tokens: list[Tensor] = []
    strengths: list[Tensor] = []
    scenes: list[SceneTokens] = []
    place = references = 0
    for inputs, clip, (begin, end) in zip(given, shard.clips, shard.video, strict=True):
        made, strength = emotions(model, inputs)
        if made is not None and strength is not None:
            rows = [[index + references if index >= 0 else -1 for index in emotion_rows(inputs, clip.grid[0])[0]]]
            scenes += scenes_of(rows, clip.grid[1:], begin, end, place)
            tokens.append(made)
            strengths.append(strength)
            references += made.shape[1]
        place += end - begin
    if not tokens:
        return None, None, ()
    return torch.cat(tokens, dim=1), torch.cat(strengths, dim=1), tuple(scenes)
