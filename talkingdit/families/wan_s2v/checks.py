# SPDX-License-Identifier: Apache-2.0
"""Checks of what a `WanS2VModel` is built from and given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from talkingdit.families.wan_s2v.audio import FEATURES_PER_LATENT
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.nn.audio_cross_attention import ABSORB
from talkingdit.nn.shapes import check_shape


def check_config(c: Any) -> None:
    """Checks the settings of a `WanS2VModel`.

    Raises:
        ValueError: names the setting that contradicts another.
    """
    if c.dim % c.num_heads or c.dim // c.num_heads % 2 or c.dim % 4:
        raise ValueError(
            f"WanS2VModel: dim must be a multiple of 4 and of num_heads with an even quotient, "
            f"got dim {c.dim} and num_heads {c.num_heads}"
        )
    if tuple(c.patch_size) != (1, 2, 2):
        raise ValueError(f"WanS2VModel: patch_size must be (1, 2, 2), got {tuple(c.patch_size)}")
    layers = list(c.audio_inject_layers)
    if layers != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < c.num_layers):
        raise ValueError(
            f"WanS2VModel: audio_inject_layers must be ascending block numbers below {c.num_layers}, got {layers}"
        )
    if c.motion_frames[0] != 4 * c.motion_frames[1] - 3:
        raise ValueError(
            f"WanS2VModel: motion_frames must be (4 n - 3, n) pixel and latent frames, got {tuple(c.motion_frames)}"
        )
    if c.residual_dtype not in ("float32", "compute"):
        raise ValueError(f"WanS2VModel: residual_dtype must be 'float32' or 'compute', got {c.residual_dtype!r}")
    if c.audio_absorb not in ABSORB[:2]:
        raise ValueError(
            f"WanS2VModel: audio_absorb must be 'none' or 'value' (the model normalises its audio queries), "
            f"got {c.audio_absorb!r}"
        )


def check_latents(config: Any, latents: Tensor, timestep: Tensor) -> None:
    """Checks the shapes of noisy latents and their timesteps.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check_shape("WanS2VModel", "latents", latents, ("B", config.in_dim, "T", "H", "W"))
    batch, _, frames, height, width = latents.shape
    if height % 2 or width % 2:
        raise ValueError(f"WanS2VModel: latents must have even height and width, got {height} x {width}")
    if timestep.shape not in ((batch,), (batch, frames)):
        raise ValueError(
            f"WanS2VModel: timestep must have shape [B] = [{batch}] or [B, T] = [{batch}, {frames}], "
            f"got {list(timestep.shape)}"
        )


def clip_size(config: Any, inputs: WanInputs, size: tuple[int, int, int] | None = None) -> tuple[int, int, int]:
    """Checks the shapes of all inputs; returns (T, H, W) of their latents.

    Args:
        config: of the model.
        size: of the latents, where the inputs do not say it.

    Raises:
        ValueError: names the argument that does not fit.
    """
    if not isinstance(inputs.text, Tensor):
        raise ValueError(f"WanS2VModel: text must be given as a tensor, got {type(inputs.text).__name__}")
    check_shape("WanS2VModel", "text", inputs.text, ("B", "L", config.text_dim))
    batch, length = inputs.text.shape[:2]
    if length > config.text_len:
        raise ValueError(f"WanS2VModel: text must have at most text_len = {config.text_len} tokens, got {length}")
    frames, height, width = _latents_size(inputs, inputs.size or size)
    if inputs.pose is not None and config.cond_dim == 0:
        raise ValueError("WanS2VModel: pose needs a model with cond_dim > 0, got a model with cond_dim = 0")
    check_shape("WanS2VModel", "reference", inputs.reference, (batch, config.in_dim, 1, height, width))
    check_shape("WanS2VModel", "history", inputs.history, (batch, config.in_dim, "Th", height, width))
    check_shape("WanS2VModel", "pose", inputs.pose, (batch, config.cond_dim, frames, height, width))
    check_shape("WanS2VModel", "text_mask", inputs.text_mask, (batch, length))
    audio, features = inputs.audio, FEATURES_PER_LATENT * frames
    if audio is not None and audio.dim() == 4 and audio.shape[3] != features:
        raise ValueError(
            f"WanS2VModel: audio must have {FEATURES_PER_LATENT} features per latent frame, "
            f"{features} for {frames} frames, got {audio.shape[3]}"
        )
    check_shape("WanS2VModel", "audio", audio, (batch, config.audio_layers, config.audio_dim, features))
    check_shape(
        "WanS2VModel", "audio_history", inputs.audio_history, (batch, config.audio_layers, config.audio_dim, "n")
    )
    return frames, height, width


def _latents_size(inputs: WanInputs, size: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """`size`, or what the inputs tell of it."""
    frames, height, width = (None, None, None) if size is None else size
    for video in (inputs.pose, inputs.reference, inputs.history):
        if video is not None and height is None and video.dim() == 5:
            height, width = video.shape[3:]
    if frames is None and inputs.pose is not None and inputs.pose.dim() == 5:
        frames = inputs.pose.shape[2]
    if frames is None and inputs.audio is not None:
        frames = inputs.audio.shape[-1] // FEATURES_PER_LATENT
    if frames is None or height is None or width is None:
        raise ValueError("WanS2VModel: size = (T, H, W) of the latents must be given, the conditions do not tell it")
    return frames, height, width
