# SPDX-License-Identifier: Apache-2.0
"""Configurations of HunyuanVideo-Avatar by name."""

from __future__ import annotations

from typing import Any

CLASSES = ("HunyuanAvatarModel",)  # class names in config.json

_RELEASED: dict[str, Any] = {
    "hidden_size": 3072,
    "num_heads": 24,
    "mlp_width_ratio": 4.0,
    "depth_double_blocks": 20,
    "depth_single_blocks": 40,
    "rope_dim_list": (16, 56, 56),
    "rope_theta": 256.0,
    "text_states_dim": 4096,
    "text_states_dim_2": 768,
    "audio_channels": 384,
    "audio_blocks": 5,
    "audio_window": 10,
    "audio_intermediate": 1024,
    "audio_tokens": 4,
    "adapter_dim": 1024,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "refiner_depth": 2,
    "reference_tokens": True,
    "reference_channels": False,
    "reference_projection": True,
    "reference_shift": False,
    "reference_time": -1.0,
    "emotion": False,
    "zero_init": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    # The released model (13B). Every value stands here, so that a default cannot move under it.
    "hunyuan_avatar_13b": _RELEASED,
    # Of the drawn world, with the module for emotions: trained from nothing by configs/hunyuan_avatar_scenes.toml.
    "hunyuan_avatar_drawn": {
        **_RELEASED,
        "hidden_size": 128,
        "num_heads": 4,
        "mlp_width_ratio": 2.0,
        "depth_double_blocks": 4,
        "depth_single_blocks": 4,
        "rope_dim_list": (8, 12, 12),
        "text_states_dim": 64,
        "text_states_dim_2": 64,
        "audio_channels": 20,
        "audio_blocks": 2,
        "audio_window": 8,
        "audio_intermediate": 128,
        "adapter_dim": 64,
        "emotion": True,
        "zero_init": False,
    },
    # For tests: the same structure, on one core.
    "hunyuan_avatar_tiny": {
        **_RELEASED,
        "hidden_size": 128,
        "num_heads": 4,
        "mlp_width_ratio": 2.0,
        "depth_double_blocks": 4,
        "depth_single_blocks": 4,
        "rope_dim_list": (8, 12, 12),
        "text_states_dim": 64,
        "text_states_dim_2": 32,
        "audio_channels": 16,
        "audio_intermediate": 64,
        "adapter_dim": 32,
    },
}
