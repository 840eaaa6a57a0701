# SPDX-License-Identifier: Apache-2.0
"""Configurations of Wan image-to-video by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Class names in config.json: ours, that of the official program, that of diffusers. The latter two are those of text to
# video, too; the weights tell.
CLASSES = ("WanI2VModel", "WanModel", "WanTransformer3DModel")

_14B: dict[str, Any] = {
    "dim": 5120,
    "ffn_dim": 13824,
    "num_heads": 40,
    "num_layers": 40,
    "in_dim": 36,  # noise, mask, latent of the first frame: 16 + 4 + 16
    "out_dim": 16,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "text_dim": 4096,
    "text_len": 512,
    "image_dim": 1280,
    "audio_inject_layers": (),
    "zero_timestep": True,
    "eps": 1e-6,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Wan2.1-I2V-14B-480P and -720P as released (arXiv:2503.20314): the same network, trained at different sizes.
    "wan_i2v_14b_480p": _14B,
    "wan_i2v_14b_720p": _14B,
    # Wan2.2-I2V-A14B: either of its two experts has no branch for a picture's features.
    "wan22_i2v_14b": {**_14B, "image_dim": 0},
    # For tests and trials on a CPU, in the latents of any autoencoder of 16 channels.
    "wan_i2v_tiny": {
        **_14B,
        "dim": 96,
        "ffn_dim": 256,
        "num_heads": 4,
        "num_layers": 4,
        "freq_dim": 64,
        "text_dim": 64,
        "text_len": 32,
        "image_dim": 32,
    },
}


def names_model(values: Mapping[str, Any], classes: Sequence[str]) -> bool:
    """Is this the config.json of a model of one of these classes? Channels tell those of all Wan models apart."""
    if values.get("_class_name") not in classes:
        return False
    if values["_class_name"] == classes[0]:
        return True
    channels = values.get("in_dim", values.get("in_channels", 16))
    outside = values.get("out_dim", values.get("out_channels", 16))
    return bool(values.get("model_type", "i2v") == "i2v" and channels > outside)
