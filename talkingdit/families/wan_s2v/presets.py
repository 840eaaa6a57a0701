# SPDX-License-Identifier: Apache-2.0
"""Configurations of Wan-S2V by name."""

from __future__ import annotations

from typing import Any

# Class names in config.json: ours, that of the official program, that of diffusers.
CLASSES = ("WanS2VModel", "WanModel_S2V", "WanS2VTransformer3DModel")

PRESETS: dict[str, dict[str, Any]] = {
    # Wan2.2-S2V-14B as released (arXiv:2508.18621). Every value stands here, so that a default cannot move under it.
    "wan_s2v_14b": {
        "dim": 5120,
        "ffn_dim": 13824,
        "num_heads": 40,
        "num_layers": 40,
        "in_dim": 16,
        "out_dim": 16,
        "cond_dim": 16,
        "patch_size": (1, 2, 2),
        "freq_dim": 256,
        "text_dim": 4096,
        "text_len": 512,
        "audio_dim": 1024,
        "audio_layers": 25,
        "num_audio_token": 4,
        "audio_inject_layers": (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
        "enable_adain": True,
        "adain_mode": "attn_norm",
        "zero_init": True,
        "audio_layer_init": 0.01,
        "zero_timestep": True,
        "enable_framepack": True,
        "framepack_drop_mode": "padd",
        "zip_frame_buckets": (1, 2, 16),
        "framepack_padding": "none",
        "add_last_motion": True,
        "motion_frames": (73, 19),
        "reference_time": 30,
        "eps": 1e-6,
    },
}
