# SPDX-License-Identifier: Apache-2.0
"""Clips of any sizes in one sequence of Wan-S2V, each a sample of its own: training without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.families.wan_s2v.checks import check_latents, clip_size
from talkingdit.families.wan_s2v.conditions import WanConditions, WanInputs
from talkingdit.families.wan_s2v.encode import (
    CleanInputs,
    clean_tokens,
    clip_layout,
    for_blocks,
    has_history,
    newest_history,
    pose_tokens,
    silence,
    touch,
)
from talkingdit.families.wan_s2v.sequence import ClipSpan, SequenceShard, sequence_shard
from talkingdit.ops import RopeLayout

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.network import WanS2VNetwork
    from talkingdit.nn.context_parallel import ContextParallel


# Groups of tokens with a timestep of their own that the kernels tell apart in one sequence: two per clip, its noisy
# tokens and the others, or one per latent frame and one.
MAX_GROUPS = 128


@dataclass(frozen=True)
class PackedClip:
    """A sample of a packed sequence. Everything is as in `WanInputs`, without the batch axis."""

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

    def inputs(self) -> WanInputs:
        """What the clip is made from, with a batch axis."""
        names = ("text", "reference", "history", "pose", "audio", "audio_history", "text_mask")
        given = {name: getattr(self, name) for name in names}
        return WanInputs(**{name: value[None] for name, value in given.items() if value is not None})


def encode_packed(model: WanS2VNetwork, clips: Sequence[PackedClip], context: ContextParallel | None) -> WanConditions:
    """The conditions of all clips, behind each other in one sequence of a batch of one.

    Every layer that is a unit of sharding runs once, on what all clips have for it.

    Raises:
        ValueError: for no clip, or one that does not fit; the message names it.
    """
    if not clips:
        raise ValueError("WanS2VModel: denoise_packed must be given at least one clip, got none")
    config, device, dtype = model.config, clips[0].latents.device, model.patch_embedding.weight.dtype
    given = [_clean_inputs(model, clip, i) for i, clip in enumerate(clips)]
    layouts: list[RopeLayout] = []
    spans: list[ClipSpan] = []
    for clip, clean_inputs in zip(clips, given, strict=True):
        _, frames, height, width = clip.latents.shape
        grid = (frames, height // 2, width // 2)
        layouts.append(clip_layout(model, grid, clean_inputs))
        spans.append(ClipSpan(spans[-1].begin + spans[-1].tokens if spans else 0, grid, len(layouts[-1])))
    shard = sequence_shard(spans, context, packed=True)
    clean = [
        clean_tokens(model, span, tokens, 1, clean_inputs)
        for span, tokens, clean_inputs in zip(spans, shard.clip_clean, given, strict=True)
    ]
    if all(one.history is None or one.newest < 2 for one in given):
        clean[0] = touch(clean[0], model.frame_packer)

    texts = torch.stack([F.pad(clip.text, (0, 0, 0, config.text_len - len(clip.text))) for clip in clips])
    local = slice(*shard.local_clips)
    text_tokens = model.text_embedding(texts.to(dtype))[local]
    audio_tokens, vectors = model.casual_audio_encoder.tokens_of_clips(
        [
            silence(model, 1, clip.latents.shape[1], device) if clip.audio is None else clip.audio[None]
            for clip in clips
        ],
        [None if clip.audio_history is None else clip.audio_history[None] for clip in clips],
    )
    local_audio = _local_frames(audio_tokens, shard).to(text_tokens.dtype)
    local_vectors = None if vectors is None else _local_frames(vectors, shard).to(dtype)
    modulation, _, _ = for_blocks(model, text_tokens, local_audio, local_vectors, precompute=False)
    masked = any(clip.text_mask is not None for clip in clips)
    return WanConditions(
        layout=RopeLayout.packed(layouts),
        shard=shard,
        clean=tuple(clean),
        text=text_tokens,
        pose=tuple(
            pose_tokens(model, None if clip.pose is None else clip.pose[None], tokens, device)
            for clip, tokens in zip(clips, shard.clip_noisy, strict=True)
        ),
        audio=local_audio,
        audio_modulation=modulation,
        text_mask=_text_mask(clips, config.text_len)[local] if masked else None,
    )


def _clean_inputs(model: WanS2VNetwork, clip: PackedClip, number: int) -> CleanInputs:
    """Checks a clip; returns what becomes its clean tokens."""
    inputs = clip.inputs()
    try:
        check_latents(model.config, clip.latents[None], clip.timestep[None])
        _, frames, height, width = clip.latents.shape
        clip_size(model.config, inputs, (frames, height, width))
        newest = newest_history(model.config, clip.add_last_motion)
    except ValueError as error:
        raise ValueError(f"{error} (packed clip {number})") from None
    history = None if clip.drop_history else inputs.history
    if history is not None and not has_history(model, history):
        history = None
    return CleanInputs(None if clip.drop_reference else inputs.reference, history, newest)


def _local_frames(parts: Sequence[Tensor], shard: SequenceShard) -> Tensor:
    """Of the frames [1, F, ...] of every clip those that this process has noisy tokens of, behind each other."""
    kept = [part[:, begin:end] for part, (begin, end) in zip(parts, shard.clip_frames, strict=True) if begin < end]
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
