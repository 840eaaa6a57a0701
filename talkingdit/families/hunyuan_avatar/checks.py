# SPDX-License-Identifier: Apache-2.0
"""Checks of what a `HunyuanAvatarModel` is built from and given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from talkingdit.families.hunyuan_avatar.audio import ABSORB, FRAMES_PER_LATENT
from talkingdit.families.hunyuan_avatar.conditions import AvatarInputs
from talkingdit.nn.shapes import check_shape

_NAME = "HunyuanAvatarModel"


def check_config(c: Any) -> None:
    """Checks the settings of a model.

    Raises:
        ValueError: names the setting that contradicts another.
    """
    if c.hidden_size % c.num_heads or c.hidden_size % 4:
        raise ValueError(
            f"{_NAME}: hidden_size must be a multiple of 4 and of num_heads, got hidden_size {c.hidden_size} and "
            f"num_heads {c.num_heads}"
        )
    split = list(c.rope_dim_list)
    if len(split) != 3 or any(part % 2 for part in split) or sum(split) != c.hidden_size // c.num_heads:
        raise ValueError(
            f"{_NAME}: rope_dim_list must be three even numbers that add up to the {c.hidden_size // c.num_heads} "
            f"channels of a head, got {split}"
        )
    if tuple(c.patch_size) != (1, 2, 2):
        raise ValueError(f"{_NAME}: patch_size must be (1, 2, 2), got {tuple(c.patch_size)}")
    if c.residual_dtype not in ("float32", "compute"):
        raise ValueError(f"{_NAME}: residual_dtype must be 'float32' or 'compute', got {c.residual_dtype!r}")
    if c.audio_absorb not in ABSORB:
        raise ValueError(f"{_NAME}: audio_absorb must be one of {', '.join(ABSORB)}, got {c.audio_absorb!r}")


def check_latents(config: Any, latents: Tensor, timestep: Tensor) -> None:
    """Checks the shapes of noisy latents and their timesteps.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check_shape(_NAME, "latents", latents, ("B", config.in_channels, "T", "H", "W"))
    _check_even("latents", latents)
    check_shape(_NAME, "timestep", timestep, (latents.shape[0],))


def clip_size(config: Any, inputs: AvatarInputs, size: tuple[int, int, int] | None = None) -> tuple[int, int, int]:
    """Checks the shapes of all inputs; returns (T, H, W) of their latents.

    Args:
        config: of the model.
        size: of the latents, where the inputs do not say it.

    Raises:
        ValueError: names the argument that does not fit.
    """
    if not isinstance(inputs.text, Tensor):
        raise ValueError(f"{_NAME}: text must be given as a tensor, got {type(inputs.text).__name__}")
    check_shape(_NAME, "text", inputs.text, ("B", "L", config.text_states_dim))
    batch, length = inputs.text.shape[:2]
    if length == 0:
        raise ValueError(f"{_NAME}: text must have at least one token, got none")
    check_shape(_NAME, "text_mask", inputs.text_mask, (batch, length))
    check_shape(_NAME, "pooled_text", inputs.pooled_text, (batch, config.text_states_dim_2))
    for name in ("motion_exp", "motion_pose"):
        check_shape(_NAME, name, getattr(inputs, name), (batch, 4))
    check_shape(_NAME, "fps", inputs.fps, (batch,))
    frames, height, width = _latents_size(inputs, inputs.size or size)
    if inputs.reference is not None:
        wanted = 1 if inputs.reference.dim() == 5 and inputs.reference.shape[2] == 1 else frames
        check_shape(_NAME, "reference", inputs.reference, (batch, config.in_channels, wanted, height, width))
    speakers = _check_voices(config, inputs, batch, frames)
    if inputs.face_mask is not None:
        wanted = 1 if inputs.face_mask.dim() == 5 and inputs.face_mask.shape[2] == 1 else frames
        check_shape(_NAME, "face_mask", inputs.face_mask, (batch, max(speakers, 0), wanted, height, width))
    if isinstance(inputs.strength, Tensor) and inputs.strength.dim():
        check_shape(_NAME, "strength", inputs.strength, (batch, speakers))
    _check_emotion(config, inputs, batch, frames)
    return frames, height, width


def speakers_of(inputs: AvatarInputs) -> int:
    """How many voices there are."""
    if inputs.audio is None:
        return 0
    return inputs.audio.shape[1] if inputs.audio.dim() == 6 else 1


def _check_voices(config: Any, inputs: AvatarInputs, batch: int, frames: int) -> int:
    """Number of speakers."""
    audio = inputs.audio
    speakers = speakers_of(inputs)
    if audio is None:
        # A mask without a voice says nothing, and is let through: guidance drops the voice alone.
        return speakers if inputs.face_mask is None or inputs.face_mask.dim() != 5 else inputs.face_mask.shape[1]
    needed = FRAMES_PER_LATENT * (frames - 1) + 1
    feature = (config.audio_window, config.audio_blocks, config.audio_channels)
    axes = (batch, speakers) if audio.dim() == 6 else (batch,)
    place = len(axes)
    if audio.dim() in (5, 6) and audio.shape[place] != needed:
        raise ValueError(
            f"{_NAME}: audio must have features for every video frame, {needed} for {frames} latent frames, "
            f"got {audio.shape[place]}"
        )
    check_shape(_NAME, "audio", audio, (*axes, needed, *feature))
    return speakers


def _check_emotion(config: Any, inputs: AvatarInputs, batch: int, frames: int) -> None:
    if inputs.emotion is None:
        return
    if not config.emotion:
        raise ValueError(f"{_NAME}: emotion needs a model with an emotion module, got a model with emotion = False")
    check_shape(_NAME, "emotion", inputs.emotion, (batch, "E", config.in_channels, 1, "H", "W"))
    _check_even("emotion", inputs.emotion)
    references = inputs.emotion.shape[1]
    index = inputs.emotion_index
    if index is not None:
        rows = index.tolist() if isinstance(index, Tensor) else [list(row) for row in index]
        if len(rows) != batch or any(not isinstance(row, list) or len(row) != frames for row in rows):
            raise ValueError(
                f"{_NAME}: emotion_index must have one number per latent frame, [{batch}, {frames}], got "
                f"{list(index.shape) if isinstance(index, Tensor) else [len(row) for row in rows]}"
            )
        largest, smallest = max(map(max, rows)), min(map(min, rows))
        if smallest < -1 or largest >= references:
            raise ValueError(
                f"{_NAME}: emotion_index must be -1 or one of {references} references, got {smallest} to {largest}"
            )
    if isinstance(inputs.emotion_strength, Tensor) and inputs.emotion_strength.dim():
        check_shape(_NAME, "emotion_strength", inputs.emotion_strength, (batch, references))


def _check_even(name: str, latents: Tensor) -> None:
    height, width = latents.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"{_NAME}: {name} must have even height and width, got {height} x {width}")


def _latents_size(inputs: AvatarInputs, size: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """`size`, or what the inputs tell of it."""
    if size is not None:
        return size
    reference, audio, mask = inputs.reference, inputs.audio, inputs.face_mask
    frames = None
    if audio is not None and audio.dim() in (5, 6):
        frames = audio.shape[-4] // FRAMES_PER_LATENT + 1
    elif reference is not None and reference.dim() == 5 and reference.shape[2] > 1:
        frames = reference.shape[2]
    like = reference if reference is not None else mask
    if frames is None or like is None or like.dim() != 5:
        raise ValueError(f"{_NAME}: size = (T, H, W) of the latents must be given, the inputs do not tell it")
    return frames, like.shape[3], like.shape[4]
