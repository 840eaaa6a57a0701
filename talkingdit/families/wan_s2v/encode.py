# SPDX-License-Identifier: Apache-2.0
"""How `WanS2VModel.encode_conditions` makes text, reference, history, pose and audio into conditions of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from talkingdit.families.wan_s2v.audio import FEATURES_PER_LATENT
from talkingdit.families.wan_s2v.checks import clip_size
from talkingdit.families.wan_s2v.conditions import (
    KeyValue,
    Packing,
    WanConditions,
    WanInputs,
    key_mask,
    present_frames,
    samples_without,
    sequence_layout,
)
from talkingdit.families.wan_s2v.sequence import HISTORY, REFERENCE, ClipSpan, sequence_shard
from talkingdit.nn.audio_cross_attention import AudioMemory
from talkingdit.nn.hooks import resident
from talkingdit.nn.ranges import Range
from talkingdit.ops import RopeLayout

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.network import WanS2VNetwork
    from talkingdit.nn.context_parallel import ContextParallel


@dataclass(frozen=True)
class CleanInputs:
    """What becomes tokens besides the noisy ones: latents with the batch axis, None where a clip has none."""

    reference: Tensor | None
    history: Tensor | None
    newest: int  # newest history buckets that are used


def encode(
    model: WanS2VNetwork,
    inputs: WanInputs,
    size: tuple[int, int, int] | None = None,
    precompute: bool = True,
    context: ContextParallel | None = None,
) -> WanConditions:
    """See `WanS2VModel.encode_conditions`; `size` counts where the inputs have none."""
    text, config = inputs.text, model.config
    frames, height, width = clip_size(config, inputs, size)
    batch, dtype = text.shape[0], model.patch_embedding.weight.dtype
    grid = (frames, height // 2, width // 2)
    given, missing = _clean_inputs(model, inputs)
    layout = clip_layout(model, grid, given)
    clip = ClipSpan(0, grid, len(layout))
    shard = sequence_shard([clip], context)
    clean = clean_tokens(model, clip, shard.clip_clean[0], batch, given)
    if given.history is None or given.newest < 2:
        clean = touch(clean, model.frame_packer)

    padding = config.text_len - text.shape[1]
    text = torch.cat([text, text.new_zeros(batch, padding, text.shape[2])], dim=1)
    text_tokens = model.text_embedding(text.to(dtype))
    text_mask = inputs.text_mask
    if text_mask is not None:
        text_mask = torch.cat([text_mask, text_mask.new_zeros(batch, padding)], dim=1)
    audio = silence(model, batch, frames, text.device) if inputs.audio is None else inputs.audio
    audio_tokens, vectors = model.casual_audio_encoder.clip_tokens(audio, inputs.audio_history)
    local = slice(*shard.clip_frames[0])
    audio_tokens = audio_tokens[:, local].to(text_tokens.dtype)
    vectors = None if vectors is None else vectors[:, local].to(dtype)
    modulation, text_kv, audio_kv = for_blocks(model, text_tokens, audio_tokens, vectors, precompute)
    return WanConditions(
        layout=layout,
        shard=shard,
        clean=(clean,),
        text=text_tokens,
        pose=(pose_tokens(model, inputs.pose, shard.clip_noisy[0], text.device),),
        audio=audio_tokens,
        audio_modulation=modulation,
        text_mask=text_mask,
        key_mask=_key_mask(inputs, clip, given, missing),
        text_kv=text_kv,
        audio_kv=audio_kv,
    )


def _clean_inputs(model: WanS2VNetwork, inputs: WanInputs) -> tuple[CleanInputs, tuple[bool | Tensor, bool | Tensor]]:
    """What becomes clean tokens, and which samples [B] or frames [B, n] lack the reference's and the history's."""
    newest = newest_history(model.config, inputs.add_last_motion)
    batch, device = inputs.text.shape[0], inputs.text.device
    reference, history = inputs.reference, inputs.history
    no_history = samples_without("drop_history", inputs.drop_history, batch, device)
    no_reference = samples_without("drop_reference", inputs.drop_reference, batch, device)
    if no_reference is True:
        reference = None
    if no_history is True or (history is not None and not has_history(model, history)):
        history = None
    if history is not None:
        present = present_frames("history_lengths", inputs.history_lengths, batch, history.shape[2], device)
        if present is not None:
            present = present.flip(1)
            if model.frame_packer is not None:
                history = torch.where(present[:, None, :, None, None], history, 0)
            elif isinstance(no_history, Tensor):
                no_history = ~present | no_history[:, None]
            else:
                no_history = ~present
    return CleanInputs(reference, history, newest), (no_reference, no_history)


def _key_mask(
    inputs: WanInputs, clip: ClipSpan, given: CleanInputs, missing: tuple[bool | Tensor, bool | Tensor]
) -> Tensor | None:
    """Which tokens each sample has, bool [B, N]; None where every sample has all."""
    batch, device = inputs.text.shape[0], inputs.text.device
    present = present_frames("lengths", inputs.lengths, batch, clip.grid[0], device)
    parts: list[tuple[int, bool | Tensor]] = [(clip.noisy, False if present is None else ~present)]
    if given.reference is not None:
        parts.append((clip.per_frame, missing[0]))
    if given.history is not None:
        parts.append((clip.tokens - sum(count for count, _ in parts), missing[1]))
    return key_mask(parts, batch, device)


def newest_history(config: Any, add_last_motion: int) -> int:
    """How many of the newest history buckets are used."""
    if add_last_motion not in (0, 1, 2):
        raise ValueError(f"WanS2VModel: add_last_motion must be 0, 1 or 2, got {add_last_motion}")
    return add_last_motion if config.add_last_motion else 0


def has_history(model: WanS2VNetwork, history: Tensor) -> bool:
    """Whether a history gives tokens: packed, no frames at all are a past of zeros."""
    return model.frame_packer is not None or history.shape[2] > 0


def clip_layout(model: WanS2VNetwork, grid: tuple[int, int, int], given: CleanInputs) -> RopeLayout:
    """Places of the tokens of a clip of (latent frames, patch rows, patch columns)."""
    config, packer = model.config, model.frame_packer
    past: int | Packing | None = None
    if given.history is not None:
        past = given.history.shape[2]
        if packer is not None:
            past = packer.buckets, packer.drop_mode, packer.padding, given.newest
    time = None if given.reference is None else config.reference_time
    return sequence_layout(grid, config.dim // config.num_heads, time, past)


def clean_tokens(model: WanS2VNetwork, clip: ClipSpan, local: Range, batch: int, given: CleanInputs) -> Tensor:
    """The tokens `local` of [reference | history]: [B, n, dim].

    Patches are embedded for these tokens alone. A packed history, which is small, is made whole and cut.
    """
    weight = model.patch_embedding.weight
    parts = [weight.new_zeros(batch, 0, model.config.dim)]
    size = 0
    if given.reference is not None:
        size = clip.per_frame
        tokens = model.patch_embedding(given.reference, (min(local[0], size), min(local[1], size)))
        parts.append(tokens + model.embed_kind(REFERENCE))
    if given.history is not None:
        begin, end = max(local[0] - size, 0), max(local[1] - size, 0)
        if model.frame_packer is None:
            tokens = model.patch_embedding(given.history, (begin, end))
        else:
            tokens = model.frame_packer(given.history, given.newest)[:, begin:end]
        parts.append(tokens + model.embed_kind(HISTORY))
    return torch.cat([part.to(parts[-1].dtype) for part in parts], dim=1)


def touch(tokens: Tensor, module: nn.Module | None) -> Tensor:
    """The same tokens, as if made with all weights of a module that this forward leaves out (perhaps in part).

    So they get a gradient of zeros instead of none. Processes that share the work reduce the gradients of all weights,
    also where one had a batch with history and another one without.
    """
    if module is None or not torch.is_grad_enabled():
        return tokens
    nothing = torch.stack([weight.flatten()[:0].sum() for weight in module.parameters()])
    return tokens + nothing.sum().to(tokens.dtype)


def silence(model: WanS2VNetwork, batch: int, frames: int, device: torch.device) -> Tensor:
    """Speech features of a clip without audio: zeros."""
    config = model.config
    shape = (batch, config.audio_layers, config.audio_dim, FEATURES_PER_LATENT * frames)
    return torch.zeros(shape, dtype=model.patch_embedding.weight.dtype, device=device)


def pose_tokens(model: WanS2VNetwork, pose: Tensor | None, local: Range, device: torch.device) -> Tensor | None:
    """What a pose video adds to the noisy tokens `local`: [B, n, dim], or [1, 1, dim] without one."""
    if model.cond_encoder is None:
        return None
    if pose is not None:
        return model.cond_encoder(pose, local)
    # No pose is a pose of zeros, of which the encoder leaves its bias.
    weight = model.cond_encoder.weight
    return model.cond_encoder(torch.zeros(1, model.config.cond_dim, 1, 2, 2, dtype=weight.dtype, device=device))


def for_blocks(
    model: WanS2VNetwork, text: Tensor, audio: Tensor, vectors: Tensor | None, precompute: bool
) -> tuple[tuple[KeyValue | None, ...], tuple[KeyValue, ...] | None, tuple[AudioMemory, ...] | None]:
    """Shift and scale of every injection; with `precompute` keys and values of text and of audio for every block.

    Args:
        text, audio, vectors: tokens and global audio vectors, see `WanConditions`.
    """
    injector = model.audio_injector
    blocks: list[Any] = list(model.blocks)
    audio_layers: list[Any] = list(injector.injector)

    modulation = tuple(injector.shift_scale(i, vectors) for i in injector.index.values())
    text_kv = audio_kv = None
    if precompute and resident(blocks):
        text_kv = tuple(block.cross_attn.key_value(text) for block in blocks)
    if precompute and resident(audio_layers):
        audio_kv = tuple(layer.memory(audio, model.config.audio_absorb) for layer in audio_layers)
    return modulation, text_kv, audio_kv
