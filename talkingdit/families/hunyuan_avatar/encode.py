# SPDX-License-Identifier: Apache-2.0
"""How `HunyuanAvatarModel.encode_conditions` makes text, picture, voices and emotions into conditions of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from talkingdit.families.hunyuan_avatar.audio import VoiceMemory, speaker_weights
from talkingdit.families.hunyuan_avatar.blocks import EPS
from talkingdit.families.hunyuan_avatar.checks import clip_size
from talkingdit.families.hunyuan_avatar.conditions import FPS, MOTION_EXP, MOTION_POSE, AvatarConditions, AvatarInputs
from talkingdit.families.hunyuan_avatar.emotion import KeyValue, SceneTokens, scenes_of
from talkingdit.families.hunyuan_avatar.injection import over_time, with_channels
from talkingdit.families.hunyuan_avatar.rope import layouts
from talkingdit.families.hunyuan_avatar.sequence import ClipSpan, sequence_shard
from talkingdit.families.hunyuan_avatar.text_refiner import used_text
from talkingdit.nn.hooks import resident
from talkingdit.nn.ranges import Range

if TYPE_CHECKING:
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel
    from talkingdit.nn.context_parallel import ContextParallel


def encode(
    model: HunyuanAvatarModel,
    inputs: AvatarInputs,
    size: tuple[int, int, int] | None = None,
    precompute: bool = True,
    context: ContextParallel | None = None,
) -> AvatarConditions:
    """See `HunyuanAvatarModel.encode_conditions`; `size` counts where the inputs have none."""
    config = model.config
    frames, height, width = clip_size(config, inputs, size)
    text, text_mask, lengths = used_text(inputs.text, inputs.text_mask)
    longest = max(1, *lengths)
    clip = clip_span(config, (frames, height, width), inputs.reference is not None, longest)
    shard = sequence_shard([clip], context)
    ragged = min(lengths) < longest
    key_mask = None
    if ragged:
        ends = torch.tensor(lengths, device=text.device) + clip.image
        key_mask = torch.arange(clip.tokens, device=text.device) < ends[:, None]
    reference, added = picture_tokens(model, inputs, clip, shard.reference[0], shard.video[0])
    audio, weights = voices(model, inputs, clip, shard.frames[0], shard.video[0])
    emotion, strength = emotions(model, inputs)
    idled = idle(model, len(lengths), audio, emotion)
    scenes: tuple[SceneTokens, ...] = ()
    if emotion is not None:
        scenes = tuple(scenes_of(emotion_rows(inputs, frames), clip.grid[1:], *shard.video[0]))
    audio_memory, emotion_memory = for_blocks(model, audio, emotion, precompute)
    return AvatarConditions(
        shard=shard,
        layouts=layouts(config, [clip]),
        text=text,
        text_mask=text_mask,
        vec=step_vector(model, *vector_inputs(config, inputs)),
        reference=(reference,),
        added=(added,),
        channels=(inputs.reference if config.reference_channels else None,),
        lengths=tuple(clip.image + length for length in lengths) if ragged else None,
        key_mask=key_mask,
        audio=audio,
        audio_weights=weights,
        audio_memory=audio_memory,
        emotion=emotion,
        emotion_strength=strength,
        emotion_scenes=scenes,
        emotion_memory=emotion_memory,
        **idled,
    )


def clip_span(config: Any, size: tuple[int, int, int], reference: bool, text: int, begin: int = 0) -> ClipSpan:
    """A clip of latents of this size in the sequence."""
    frames, rows, columns = size[0], size[1] // 2, size[2] // 2
    return ClipSpan(
        begin, rows * columns if reference and config.reference_tokens else 0, (frames, rows, columns), text
    )


def vector_inputs(config: Any, inputs: AvatarInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pooled_text, motion_exp, motion_pose and fps, with what stands for those that are not given."""
    batch, device = inputs.text.shape[0], inputs.text.device
    pooled, exp, pose, fps = inputs.pooled_text, inputs.motion_exp, inputs.motion_pose, inputs.fps
    return (
        torch.zeros(batch, config.text_states_dim_2, device=device) if pooled is None else pooled,
        torch.full((batch, 4), MOTION_EXP, device=device) if exp is None else exp.float(),
        torch.full((batch, 4), MOTION_POSE, device=device) if pose is None else pose.float(),
        torch.full((batch,), FPS, device=device) if fps is None else fps.float(),
    )


def step_vector(model: HunyuanAvatarModel, pooled: Tensor, exp: Tensor, pose: Tensor, fps: Tensor) -> Tensor:
    """All of the vector of a step but its timestep: [B, dim] float32."""
    with torch.autocast(pooled.device.type, enabled=False):
        moved = model.motion_exp(exp).flatten(1) + model.motion_pose(pose).flatten(1)
        return model.vector_in(pooled) + moved + model.fps_proj(fps)


def step_input(model: HunyuanAvatarModel, latents: Tensor, timestep: Tensor, inputs: AvatarInputs) -> Tensor:
    """See `HunyuanAvatarModel.step_input`."""
    with torch.autocast(timestep.device.type, enabled=False):
        vec = step_vector(model, *vector_inputs(model.config, inputs)) + model.time_in(timestep.float())
    picture = None if inputs.reference is None else inputs.reference[:, :, :1]
    tokens: Tensor = model.img_in(with_channels(model.config, latents, picture))
    if not len(model.double_blocks):
        return tokens
    modulation: Any = model.double_blocks[0].img_mod
    # Weights that a hook brings to the device for the block's forward alone are used where they lie.
    weight = modulation.linear.weight
    shift, scale = modulation(F.silu(vec)[:, None].to(weight.device, model.img_in.proj.weight.dtype))[:2]
    shift, scale = (x.to(tokens.device, torch.float32) for x in (shift, scale))
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=EPS) * (1 + scale) + shift


def picture_tokens(
    model: HunyuanAvatarModel, inputs: AvatarInputs, clip: ClipSpan, held: Range, video: Range
) -> tuple[Tensor, Tensor | None]:
    """Tokens of the reference that are held, and what it adds to the video tokens that are."""
    weight, config = model.img_in.proj.weight, model.config
    batch = inputs.text.shape[0]
    reference = inputs.reference
    if reference is None:
        tokens = touch(weight.new_zeros(batch, 0, config.hidden_size), model.ref_in, model.before_proj)
        return tokens, None
    tokens = weight.new_zeros(batch, 0, config.hidden_size)
    if clip.reference:
        # The picture alone is its own repetition, where its channels are doubled.
        picture = reference[:, :, :1]
        picture = torch.cat([picture, picture], dim=1) if config.reference_channels else picture
        tokens = model.img_in(picture, held)
    if model.ref_in is None or model.before_proj is None:
        return tokens, None
    return tokens, model.before_proj(model.ref_in(over_time(reference, clip.grid[0]), video))


def voices(
    model: HunyuanAvatarModel, inputs: AvatarInputs, clip: ClipSpan, frames: Range, video: Range
) -> tuple[Tensor | None, Tensor | None]:
    """Audio tokens [B, P, F, A, dim] of these latent frames, and weights [B, P, n] of these video tokens."""
    audio = inputs.audio
    if audio is None or (audio.dim() == 6 and audio.shape[1] == 0):
        return None, None
    if audio.dim() == 5:
        audio = audio[:, None]
    tokens = model.audio_proj.latent_tokens(audio)[:, :, slice(*frames)]
    return tokens, heard_by(inputs, audio.shape[1], clip, audio.device)[:, :, slice(*video)]


def heard_by(inputs: AvatarInputs, speakers: int, clip: ClipSpan, device: torch.device) -> Tensor:
    """How much of every speaker each video token of a clip hears: [B, P, tokens] float32."""
    batch, strength = inputs.text.shape[0], inputs.strength
    if not isinstance(strength, Tensor):
        strength = torch.tensor(1.0 if strength is None else float(strength))
    strength = strength.to(device).expand(batch, speakers)
    return speaker_weights(inputs.face_mask, strength, speakers, (batch, *clip.grid))


def emotions(model: HunyuanAvatarModel, inputs: AvatarInputs) -> tuple[Tensor | None, Tensor | None]:
    """Tokens of the references [B, E, n, dim] and their strengths [B, E]."""
    if inputs.emotion is None or inputs.emotion.shape[1] == 0:
        return None, None
    strength = inputs.emotion_strength
    if not isinstance(strength, Tensor):
        strength = torch.tensor(1.0 if strength is None else float(strength))
    strength = strength.to(inputs.emotion.device, torch.float32).expand(inputs.emotion.shape[:2])
    assert model.emotion_in is not None  # checked with the shapes
    return model.emotion_in(inputs.emotion), strength


def emotion_rows(inputs: AvatarInputs, frames: int) -> list[list[int]]:
    """Per sample, the reference of every latent frame."""
    index = inputs.emotion_index
    if index is None:
        return [[0] * frames for _ in range(inputs.text.shape[0])]
    rows: list[list[int]] = index.tolist() if isinstance(index, Tensor) else [list(row) for row in index]
    return rows


def touch(tokens: Tensor, *modules: nn.Module | None) -> Tensor:
    """The same tokens, as if made with all weights of modules that this forward leaves out.

    So they get a gradient of zeros instead of none. Processes that share the work reduce the gradients of all weights,
    also where one had a batch with a voice and another one without.
    """
    weights = [weight for module in modules if module is not None for weight in module.parameters()]
    if not weights or not torch.is_grad_enabled():
        return tokens
    return tokens + torch.stack([weight.flatten()[:0].sum() for weight in weights]).sum().to(tokens.dtype)


def idle(model: HunyuanAvatarModel, batch: int, audio: Tensor | None, emotion: Tensor | None) -> dict[str, Any]:
    """What the layers for voices and emotions are run with, on no token, where there are none.

    Processes that share the work must run the same layers, also where one has a voice and another one has none, and
    reduce the gradients of all weights.
    """
    config, weight = model.config, model.img_in.proj.weight
    found: dict[str, Any] = {}
    feeling = model.emotion_adapter_blocks
    if audio is None and _shares(model.audio_proj):
        silence = weight.new_zeros(batch, 1, 1, config.audio_window, config.audio_blocks, config.audio_channels)
        found["idle_audio"] = model.audio_proj.latent_tokens(silence)
    if emotion is None and feeling is not None and len(feeling) and _shares(feeling[0]):
        found["idle_emotion"] = touch(weight.new_zeros(batch, 1, 1, config.hidden_size), model.emotion_in)
    return found


def _shares(module: nn.Module) -> bool:
    """May this module have to run although its result is not wanted?"""
    return torch.is_grad_enabled() or isinstance(module, FSDPModule)


def for_blocks(
    model: HunyuanAvatarModel, audio: Tensor | None, emotion: Tensor | None, precompute: bool
) -> tuple[tuple[VoiceMemory, ...] | None, tuple[KeyValue, ...] | None]:
    """With `precompute`, keys and values of voices and emotions for every adapter."""

    voice_layers: list[Any] = list(model.audio_adapter_blocks)
    emotion_layers: list[Any] = list(model.emotion_adapter_blocks or [])
    audio_memory = emotion_memory = None
    if precompute and audio is not None and resident(voice_layers):
        absorb = "none" if torch.is_grad_enabled() else model.config.audio_absorb
        audio_memory = tuple(layer.memory(audio, absorb) for layer in voice_layers)
    if precompute and emotion is not None and resident(emotion_layers):
        emotion_memory = tuple(layer.memory(emotion) for layer in emotion_layers)
    return audio_memory, emotion_memory
