# SPDX-License-Identifier: Apache-2.0
"""Configurations of drawn characters by name."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The model that ships with the package: drawn characters, latents of 12 x 12, trained from nothing.
    "puppet_tiny": {
        "dim": 128,
        "ffn_dim": 512,
        "num_heads": 2,
        "num_layers": 5,
        "in_dim": 16,
        "out_dim": 16,
        "cond_dim": 0,
        "freq_dim": 128,
        "text_dim": 64,
        "text_len": 36,
        "audio_dim": 160,
        "audio_layers": 2,
        "num_audio_token": 4,
        "audio_inject_layers": (0, 1, 2, 3),
        "enable_adain": True,
        "zero_init": False,
        "audio_layer_init": 1.0,
        "framepack_padding": "replicate",
    },
}
