# SPDX-License-Identifier: Apache-2.0
"""How `WanI2VModel` makes text, picture, audio, known frames and extra tokens into conditions of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.families.wan_i2v.checks import check_inputs
from talkingdit.families.wan_i2v.conditions import WanI2VConditions, WanI2VInputs, clip_layout
from talkingdit.families.wan_s2v.conditions import KeyValue, key_mask, present_frames, samples_without
from talkingdit.families.wan_s2v.sequence import ClipSpan, SequenceShard, sequence_shard
from talkingdit.nn.hooks import resident
from talkingdit.nn.ranges import Range
from talkingdit.ops import RopeLayout

if TYPE_CHECKING:
    from talkingdit.families.wan_i2v.model import WanI2VModel
    from talkingdit.nn.context_parallel import ContextParallel

Size = tuple[int, int, int]


def encode(
    model: WanI2VModel,
    clips: Sequence[WanI2VInputs],
    sizes: Sequence[Size | None],
    *,
    precompute: bool = True,
    context: ContextParallel | None = None,
    packed: bool = False,
) -> WanI2VConditions:
    """See `WanI2VModel.encode_conditions`.

    Args:
        clips: one with a batch axis, or with `packed` one or more of a batch of one each.
        sizes: (T, H, W) of their latents, where they do not say it themselves.

    Raises:
        ValueError: for a shape that does not fit; the message names it, and which packed clip.
    """
    found = [
        _checked(model, clip, size, i if packed else None)
        for i, (clip, size) in enumerate(zip(clips, sizes, strict=True))
    ]
    layouts: list[RopeLayout] = []
    spans: list[ClipSpan] = []
    head_dim = model.config.dim // model.config.num_heads
    for clip, (frames, height, width) in zip(clips, found, strict=True):
        grid = (frames, height // 2, width // 2)
        layouts.append(clip_layout(grid, [extra.place for extra in clip.extra if extra.drop is not True], head_dim))
        spans.append(ClipSpan(spans[-1].begin + spans[-1].tokens if spans else 0, grid, len(layouts[-1])))
    shard = sequence_shard(spans, context, packed=packed)
    local = slice(*shard.local_clips) if packed else slice(None)

    text = model.text_embedding(_texts(model, clips)[local].to(model.patch_embedding.weight.dtype))
    image = _image(model, clips, local)
    masks = _text_mask(model, clips)
    text_kv, image_kv = _for_blocks(model, text, image) if precompute else (None, None)
    return WanI2VConditions(
        layout=RopeLayout.packed(layouts) if packed else layouts[0],
        shard=shard,
        condition=tuple(_condition(model, clip, size) for clip, size in zip(clips, found, strict=True)),
        clean=tuple(_extra_tokens(model, clip, span) for clip, span in zip(clips, shard.clip_clean, strict=True)),
        text=text,
        image=image,
        audio=_audio(model, clips, shard),
        text_mask=None if masks is None else masks[local],
        key_mask=None if packed else _key_mask(clips[0], spans[0]),
        text_kv=text_kv,
        image_kv=image_kv,
    )


def _checked(model: WanI2VModel, clip: WanI2VInputs, size: Size | None, number: int | None) -> Size:
    try:
        return check_inputs(model, clip, size)
    except ValueError as error:
        raise ValueError(f"{error}{'' if number is None else f' (packed clip {number})'}") from None


def _texts(model: WanI2VModel, clips: Sequence[WanI2VInputs]) -> Tensor:
    """[B, text_len, text_dim], padded with zeros."""
    length = model.config.text_len
    return torch.cat([F.pad(clip.text, (0, 0, 0, length - clip.text.shape[1])) for clip in clips])


def _text_mask(model: WanI2VModel, clips: Sequence[WanI2VInputs]) -> Tensor | None:
    """bool [B, text_len]; a clip without a mask attends its text and all padding. None where none has a mask."""
    if all(clip.text_mask is None for clip in clips):
        return None
    masks, length = [], model.config.text_len
    for clip in clips:
        if clip.text_mask is None:
            masks.append(torch.ones(len(clip.text), length, dtype=torch.bool, device=clip.text.device))
        else:
            masks.append(F.pad(clip.text_mask, (0, length - clip.text_mask.shape[1])))
    return torch.cat(masks)


def _image(model: WanI2VModel, clips: Sequence[WanI2VInputs], local: slice) -> Tensor | None:
    """Tokens [B, L, dim] of the pictures; of zeros where a clip has none."""
    if model.img_emb is None:
        return None
    like = next((clip.image for clip in clips if clip.image is not None), None)
    count = 1 if like is None else like.shape[1]  # zeros are the same token, however many
    dtype, width = model.patch_embedding.weight.dtype, model.config.image_dim
    features = [
        torch.zeros(len(clip.text), count, width, dtype=dtype, device=clip.text.device) if clip.image is None
        else clip.image.to(dtype)
        for clip in clips
    ]  # fmt: skip
    return model.img_emb(torch.cat(features)[local])


def _condition(model: WanI2VModel, clip: WanI2VInputs, size: Size) -> Tensor:
    channels = model.config.in_dim - model.config.out_dim
    if clip.condition is not None:
        return clip.condition
    dtype = model.patch_embedding.weight.dtype
    return torch.zeros(len(clip.text), channels, *size, dtype=dtype, device=clip.text.device)


def _extra_tokens(model: WanI2VModel, clip: WanI2VInputs, local: Range) -> Tensor:
    """The tokens `local` of the extra ones of a clip: [B, n, dim]. Patches are embedded for these alone."""
    weight = model.patch_embedding.weight
    parts = [weight.new_zeros(len(clip.text), 0, model.config.dim)]
    begin = 0
    for extra in clip.extra:
        if extra.drop is True:
            continue
        first, last = (min(max(place - begin, 0), extra.tokens) for place in local)
        if first < last:
            parts.append(model.patch_embedding(model.known(extra.latents), (first, last)))
        begin += extra.tokens
    return torch.cat([part.to(parts[-1].dtype) for part in parts], dim=1)


def _key_mask(clip: WanI2VInputs, span: ClipSpan) -> Tensor | None:
    """Which tokens each sample has, bool [B, N]; None where every sample has all."""
    batch, device = len(clip.text), clip.text.device
    present = present_frames("lengths", clip.lengths, batch, span.grid[0], device)
    parts: list[tuple[int, bool | Tensor]] = [(span.noisy, False if present is None else ~present)]
    for i, extra in enumerate(clip.extra):
        missing = samples_without(f"extra[{i}].drop", extra.drop, batch, device)
        if missing is not True or extra.drop is not True:
            hidden = missing if isinstance(missing, Tensor) or not missing else torch.ones(batch, dtype=torch.bool)
            parts.append((extra.tokens, hidden if hidden is False else hidden.to(device)))
    return key_mask(parts, batch, device)


def _audio(model: WanI2VModel, clips: Sequence[WanI2VInputs], shard: SequenceShard) -> Tensor | None:
    """Audio tokens [B, F, ...] of the latent frames that noisy tokens are in; of packed clips behind each other."""
    made = model.encode_audio(clips, [clip.grid[0] for clip in shard.clips])
    if made is None:
        return None
    kept = [part[:, begin:end] for part, (begin, end) in zip(made, shard.clip_frames, strict=True) if begin < end]
    return torch.cat(kept, dim=1).to(model.patch_embedding.weight.dtype)


def _for_blocks(
    model: WanI2VModel, text: Tensor, image: Tensor | None
) -> tuple[tuple[KeyValue, ...] | None, tuple[KeyValue, ...] | None]:
    """Keys and values of text and picture for every block, where blocks hold their weights outside of their forward."""
    blocks: list[Any] = list(model.blocks)
    if not resident(blocks):
        return None, None
    text_kv = tuple(block.cross_attn.key_value(text) for block in blocks)
    return text_kv, None if image is None else tuple(block.cross_attn.image_key_value(image) for block in blocks)
