# SPDX-License-Identifier: Apache-2.0
"""Configurations of SkyReels-Audio by name."""

from __future__ import annotations

from typing import Any

from talkingdit.families.wan_i2v.presets import PRESETS as BASE

# Class names in config.json.
CLASSES = ("SkyReelsAudioModel",)

# The paper builds on SkyReels-V2, whose image-to-video networks are those of Wan 2.1. It does not state which Whisper
# model hears (here the encoder of the large ones, at 50 states a second, two to a video frame of 25 a second), nor
# which blocks do (here all). All audio tokens of a clip are one sequence that every video token attends to.
_HEARING: dict[str, Any] = {
    "audio_dim": 1280,
    "audio_layers": 2,
    "audio_window": None,
    "audio_rope": True,
    "audio_theta": 10000.0,
}


def _preset(base: str, layers: int, **changes: Any) -> dict[str, Any]:
    values = {**BASE[base], **_HEARING, "num_layers": layers, **changes}
    return {**values, "audio_inject_layers": tuple(range(layers))}


PRESETS: dict[str, dict[str, Any]] = {
    # On SkyReels-V2-I2V-14B-540P, as in the paper.
    "skyreels_audio": _preset("wan_i2v_14b_480p", 40),
    # On SkyReels-V2-I2V-1.3B-540P.
    "skyreels_audio_1_3b": _preset("wan_i2v_14b_480p", 30, dim=1536, ffn_dim=8960, num_heads=12),
    # For tests and trials on a CPU; speech features of the drawn world are as wide.
    "skyreels_audio_tiny": _preset("wan_i2v_tiny", 4, audio_dim=80),
}
