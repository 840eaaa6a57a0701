# SPDX-License-Identifier: Apache-2.0
"""Clips of any sizes in one sequence of Wan-S2V, each a sample of its own: training without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.families.wan_s2v.conditions import WanConditions, check_latents, clip_size, sequence_layout
from talkingdit.families.wan_s2v.encode import (
    clean_tokens,
    for_blocks,
    has_history,
    newest_history,
    past_of,
    pose_tokens,
    silence,
    touch,
)
from talkingdit.families.wan_s2v.sequence import ClipSpan, SequenceShard, sequence_shard
from talkingdit.ops import RopeLayout

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.model import WanS2VModel
    from talkingdit.nn.context_parallel import ContextParallel

# Groups of tokens with a timestep of their own that the kernels tell apart in one sequence: two per clip, its noisy
# tokens and the others, or one per latent frame and one.
MAX_GROUPS = 128


@dataclass(frozen=True)
class PackedClip:
    """A sample of a packed sequence. Everything is as in `WanS2VModel.encode_conditions`, without the batch axis."""

    latents: Tensor  # [in_dim, T, H, W]
    timestep: Tensor  # [] in 0..1000, or [T], one per latent frame
    text: Tensor  # [L, text_dim]
    reference: Tensor | None = None  # [in_dim, 1, H, W]
    history: Tensor | None = None  # [in_dim, Th, H, W], the newest last
    drop_history: bool = False
    drop_reference: bool = False
    add_last_motion: int = 2
    pose: Tensor | None = None  # [cond_dim, T, H, W]
    audio: Tensor | None = None  # [audio_layers, audio_dim, 4 T]
    audio_history: Tensor | None = None  # [audio_layers, audio_dim, n]
    text_mask: Tensor | None = None  # bool [L]


def encode_packed(model: WanS2VModel, clips: Sequence[PackedClip], context: ContextParallel | None) -> WanConditions:
    """The conditions of all clips, behind each other in one sequence of a batch of one.

    Every layer that is a unit of sharding runs once, on what all clips have for it.

    Raises:
        ValueError: for no clip, too many, or one that does not fit; the message names it.
    """
    if not clips:
        raise ValueError("WanS2VModel: packed must hold at least one clip, got none")
    config, device, dtype = model.config, clips[0].latents.device, model.patch_embedding.weight.dtype
    places, layouts, tokens = [], [], 0
    references, histories, newest = [], [], []
    for i, clip in enumerate(clips):
        try:
            _check(model, clip)
            newest.append(newest_history(config, clip.add_last_motion))
        except ValueError as error:
            raise ValueError(f"{error} (packed clip {i})") from None
        references.append(None if clip.reference is None or clip.drop_reference else clip.reference[None])
        history = None if clip.history is None or clip.drop_history else clip.history[None]
        histories.append(history if history is not None and has_history(model, history) else None)
        _, frames, height, width = clip.latents.shape
        grid = (frames, height // 2, width // 2)
        time = None if references[i] is None else config.reference_time
        layout = sequence_layout(grid, config.dim // config.num_heads, time, past_of(model, histories[i], newest[i]))
        layouts.append(layout)
        places.append(ClipSpan(tokens, grid, len(layout)))
        tokens += len(layout)
    share = sequence_shard(places, context, packed=True)
    clean = [
        clean_tokens(model, place, here, 1, reference, history, last)
        for place, here, reference, history, last in zip(
            places, share.clean, references, histories, newest, strict=True
        )
    ]
    if all(history is None or last < 2 for history, last in zip(histories, newest, strict=True)):
        clean[0] = touch(clean[0], model.frame_packer)

    texts = torch.stack([F.pad(clip.text, (0, 0, 0, config.text_len - len(clip.text))) for clip in clips])
    there = slice(*share.texts)
    text_tokens = model.text_embedding(texts.to(dtype))[there]
    audio_tokens, vectors = model.casual_audio_encoder.tokens_of_clips(
        [
            silence(model, 1, clip.latents.shape[1], device) if clip.audio is None else clip.audio[None]
            for clip in clips
        ],
        [None if clip.audio_history is None else clip.audio_history[None] for clip in clips],
    )
    heard = _cut(audio_tokens, share).to(text_tokens.dtype)
    spoken = None if vectors is None else _cut(vectors, share).to(dtype)
    modulation, _, _ = for_blocks(model, text_tokens, heard, spoken, precompute=False)
    return WanConditions(
        layout=RopeLayout.packed(layouts),
        share=share,
        clean=tuple(clean),
        text=text_tokens,
        pose=tuple(
            pose_tokens(model, None if clip.pose is None else clip.pose[None], here, device)
            for clip, here in zip(clips, share.noisy, strict=True)
        ),
        audio=heard,
        audio_modulation=modulation,
        text_mask=_text_mask(clips, config.text_len)[there] if any(c.text_mask is not None for c in clips) else None,
    )


def packed_time(
    model: WanS2VModel, clips: Sequence[PackedClip], share: SequenceShard
) -> tuple[Tensor, list[int], Tensor, list[int]]:
    """Modulation of the blocks [1, G, 6, dim] with the ends of its groups, and the time embedding of the noisy tokens
    alone with theirs. The other tokens are at timestep 0, or with `zero_timestep` off at that of their clip.

    Raises:
        ValueError: more groups than the kernels tell apart, or a timestep per latent frame without `zero_timestep`.
    """
    at_zero = model.config.zero_timestep and any(place.tokens > place.noisy for place in share.clips)
    steps = [clip.timestep.reshape(-1) for clip in clips]
    time, time6 = model.embed_time(torch.cat([*steps, steps[0].new_zeros(1)] if at_zero else steps)[None])
    rows: list[Tensor] = []
    ends: list[int] = []
    head_ends: list[int] = []
    used = noisy = 0
    for i, (step, place) in enumerate(zip(steps, share.clips, strict=True)):
        each = place.noisy // len(step)
        rows.append(time6[:, used : used + len(step)])
        ends += range(place.begin + each, place.begin + place.noisy + 1, each)
        head_ends += range(noisy + each, noisy + place.noisy + 1, each)
        used, noisy = used + len(step), noisy + place.noisy
        if place.tokens == place.noisy:
            continue
        if at_zero:
            rows.append(time6[:, -1:])
            ends.append(place.begin + place.tokens)
        elif len(step) == 1:
            ends[-1] = place.begin + place.tokens
        else:
            raise ValueError(
                f"WanS2VModel: a timestep per latent frame needs zero_timestep, got a model without it "
                f"(packed clip {i})"
            )
    if len(ends) > MAX_GROUPS:
        raise ValueError(
            f"WanS2VModel: packed clips must have at most {MAX_GROUPS} groups of tokens with a timestep of their own "
            f"(two per clip), got {len(ends)} of {len(clips)} clips"
        )
    return torch.cat(rows, dim=1), ends, time[:, :used], head_ends


def _check(model: WanS2VModel, clip: PackedClip) -> None:
    config = model.config
    check_latents(config, clip.latents[None], clip.timestep[None])

    given = (clip.reference, clip.history, clip.pose, clip.audio, clip.audio_history, clip.text_mask)
    reference, history, pose, audio, before, mask = (None if value is None else value[None] for value in given)
    _, frames, height, width = clip.latents.shape
    clip_size(config, clip.text[None], reference, history, pose, audio, before, mask, (frames, height, width))


def _cut(parts: Sequence[Tensor], share: SequenceShard) -> Tensor:
    """Of the frames [1, F, ...] of every clip those that this process has noisy tokens of, behind each other."""
    kept = [part[:, begin:end] for part, (begin, end) in zip(parts, share.frames, strict=True) if begin < end]
    return torch.cat(kept, dim=1)


def _text_mask(clips: Sequence[PackedClip], length: int) -> Tensor:
    """bool [clips, length]; a clip without a mask attends all of its text and the padding, as it does alone."""
    masks = []
    for clip in clips:
        if clip.text_mask is None:
            masks.append(torch.ones(length, dtype=torch.bool, device=clip.text.device))
        else:
            masks.append(F.pad(clip.text_mask, (0, length - len(clip.text_mask))))
    return torch.stack(masks)
