# SPDX-License-Identifier: Apache-2.0
"""How `WanS2VModel.encode_conditions` makes text, reference, history, pose and audio into conditions of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from talkingdit.families.wan_s2v.audio import FEATURES_PER_LATENT
from talkingdit.families.wan_s2v.conditions import (
    KeyValue,
    Packing,
    WanConditions,
    clip_size,
    dropped,
    key_mask,
    present_frames,
    sequence_layout,
)
from talkingdit.families.wan_s2v.sequence import ClipSpan, Range, sequence_shard
from talkingdit.nn.audio_cross_attention import AudioMemory

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.model import WanS2VModel
    from talkingdit.nn.context_parallel import ContextParallel


def encode(
    model: WanS2VModel,
    text: Tensor,
    *,
    reference: Tensor | None = None,
    history: Tensor | None = None,
    drop_history: bool | Sequence[bool] | Tensor = False,
    drop_reference: bool | Sequence[bool] | Tensor = False,
    add_last_motion: int = 2,
    pose: Tensor | None = None,
    audio: Tensor | None = None,
    audio_history: Tensor | None = None,
    text_mask: Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    history_lengths: Sequence[int] | Tensor | None = None,
    size: tuple[int, int, int] | None = None,
    precompute: bool = True,
    context: ContextParallel | None = None,
) -> WanConditions:
    """See `WanS2VModel.encode_conditions`."""
    config = model.config
    frames, height, width = clip_size(config, text, reference, history, pose, audio, audio_history, text_mask, size)
    add_last_motion = newest_history(config, add_last_motion)
    batch, dtype = text.shape[0], model.patch_embedding.weight.dtype
    history_gone = dropped("drop_history", drop_history, batch, text.device)
    reference_gone = dropped("drop_reference", drop_reference, batch, text.device)
    if reference_gone is True:
        reference = None
    if history_gone is True or (history is not None and not has_history(model, history)):
        history = None

    grid = (frames, height // 2, width // 2)
    there = present_frames("lengths", lengths, batch, frames, text.device)
    parts: list[tuple[int, bool | Tensor]] = [(frames * grid[1] * grid[2], False if there is None else ~there)]
    if reference is not None:
        parts.append((grid[1] * grid[2], reference_gone))
    if history is not None:
        there = present_frames("history_lengths", history_lengths, batch, history.shape[2], text.device)
        if there is not None:
            there = there.flip(1)
            if model.frame_packer is None:
                history_gone = ~there | history_gone[:, None] if isinstance(history_gone, Tensor) else ~there
            else:
                history = torch.where(there[:, None, :, None, None], history, 0)
    place = None if reference is None else config.reference_time
    layout = sequence_layout(grid, config.dim // config.num_heads, place, past_of(model, history, add_last_motion))
    if history is not None:
        parts.append((len(layout) - sum(count for count, _ in parts), history_gone))
    clip = ClipSpan(0, grid, len(layout))
    share = sequence_shard([clip], context)
    clean = clean_tokens(model, clip, share.clean[0], batch, reference, history, add_last_motion)
    if history is None or add_last_motion < 2:
        clean = touch(clean, model.frame_packer)

    text = torch.cat([text, text.new_zeros(batch, config.text_len - text.shape[1], text.shape[2])], dim=1)
    text_tokens = model.text_embedding(text.to(dtype))
    if text_mask is not None:
        rest = text_mask.new_zeros(batch, config.text_len - text_mask.shape[1])
        text_mask = torch.cat([text_mask, rest], dim=1)
    if audio is None:
        audio = silence(model, batch, frames, text.device)
    audio_tokens, vectors = model.casual_audio_encoder.clip_tokens(audio, audio_history)
    here = slice(*share.frames[0])
    audio_tokens = audio_tokens[:, here].to(text_tokens.dtype)
    vectors = None if vectors is None else vectors[:, here].to(dtype)
    modulation, text_kv, audio_kv = for_blocks(model, text_tokens, audio_tokens, vectors, precompute)
    return WanConditions(
        layout=layout,
        share=share,
        clean=(clean,),
        text=text_tokens,
        pose=(pose_tokens(model, pose, share.noisy[0], text.device),),
        audio=audio_tokens,
        audio_modulation=modulation,
        text_mask=text_mask,
        key_mask=key_mask(parts, batch, text.device),
        text_kv=text_kv,
        audio_kv=audio_kv,
    )


def newest_history(config: Any, add_last_motion: int) -> int:
    """How many of the newest history buckets are used."""
    if add_last_motion not in (0, 1, 2):
        raise ValueError(f"WanS2VModel: add_last_motion must be 0, 1 or 2, got {add_last_motion}")
    return add_last_motion if config.add_last_motion else 0


def has_history(model: WanS2VModel, history: Tensor) -> bool:
    """Whether a history gives tokens: packed, no frames at all are a past of zeros."""
    return model.frame_packer is not None or history.shape[2] > 0


def past_of(model: WanS2VModel, history: Tensor | None, add_last_motion: int) -> int | Packing | None:
    """What `sequence_layout` has to know of a history [B, in_dim, Th, H, W]."""
    if history is None:
        return None
    packer = model.frame_packer
    if packer is None:
        return history.shape[2]
    return packer.buckets, packer.drop_mode, packer.padding, add_last_motion


def clean_tokens(
    model: WanS2VModel,
    clip: ClipSpan,
    here: Range,
    batch: int,
    reference: Tensor | None,
    history: Tensor | None,
    add_last_motion: int,
) -> Tensor:
    """The tokens `here` of [reference | history]: [B, n, dim].

    Patches are embedded for these tokens alone. A packed history, which is small, is made whole and cut.
    """
    weight = model.patch_embedding.weight
    parts = [weight.new_zeros(batch, 0, model.config.dim)]
    size = 0
    if reference is not None:
        size = clip.per_frame
        parts.append(model.patch_embedding(reference, (min(here[0], size), min(here[1], size))) + model.embed_kind(1))
    if history is not None:
        begin, end = max(here[0] - size, 0), max(here[1] - size, 0)
        if model.frame_packer is None:
            tokens = model.patch_embedding(history, (begin, end))
        else:
            tokens = model.frame_packer(history, add_last_motion)[:, begin:end]
        parts.append(tokens + model.embed_kind(2))
    return torch.cat([part.to(parts[-1].dtype) for part in parts], dim=1)


def touch(tokens: Tensor, module: nn.Module | None) -> Tensor:
    """The same tokens, as if made with all weights of a module that this forward leaves out (perhaps in part).

    So they get a gradient of zeros instead of none. Processes that share the work reduce the gradients of all weights
    together, also where one had a batch with history and another one without.
    """
    if module is None or not torch.is_grad_enabled():
        return tokens
    nothing = torch.stack([weight.flatten()[:0].sum() for weight in module.parameters()])
    return tokens + nothing.sum().to(tokens.dtype)


def silence(model: WanS2VModel, batch: int, frames: int, device: torch.device) -> Tensor:
    """Speech features of a clip without audio: zeros."""
    config = model.config
    shape = (batch, config.audio_layers, config.audio_dim, FEATURES_PER_LATENT * frames)
    return torch.zeros(shape, dtype=model.patch_embedding.weight.dtype, device=device)


def pose_tokens(model: WanS2VModel, pose: Tensor | None, here: Range, device: torch.device) -> Tensor | None:
    """What a pose video adds to the noisy tokens `here`: [B, n, dim], or [1, 1, dim] without one."""
    if model.cond_encoder is None:
        return None
    if pose is not None:
        return model.cond_encoder(pose, here)
    # No pose is a pose of zeros, of which the encoder leaves its bias.
    weight = model.cond_encoder.weight
    return model.cond_encoder(torch.zeros(1, model.config.cond_dim, 1, 2, 2, dtype=weight.dtype, device=device))


def for_blocks(
    model: WanS2VModel, text: Tensor, audio: Tensor, vectors: Tensor | None, precompute: bool
) -> tuple[tuple[KeyValue | None, ...], tuple[KeyValue, ...] | None, tuple[AudioMemory, ...] | None]:
    """Shift and scale of every injection; with `precompute` keys and values of text and of audio for every block.

    Args:
        text, audio, vectors: tokens and global audio vectors, see `WanConditions`.
    """
    injector = model.audio_injector
    blocks: list[Any] = list(model.blocks)
    hearing: list[Any] = list(injector.injector)

    def at_hand(layers: list[Any]) -> bool:
        away = (isinstance(layer, FSDPModule) or hasattr(layer, "_diffusers_hook") for layer in layers)
        return precompute and not any(away)

    modulation = tuple(injector.shift_scale(i, vectors) for i in injector.index.values())
    text_kv = tuple(block.cross_attn.key_value(text) for block in blocks) if at_hand(blocks) else None
    absorb = model.config.audio_absorb
    audio_kv = tuple(layer.memory(audio, absorb) for layer in hearing) if at_hand(hearing) else None
    return modulation, text_kv, audio_kv
