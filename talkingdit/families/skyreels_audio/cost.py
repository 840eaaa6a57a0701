# SPDX-License-Identifier: Apache-2.0
"""Memory and work of SkyReels-Audio, see `talkingdit.plan.cost`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.families.skyreels_audio.presets import PRESETS
from talkingdit.families.wan_i2v.cost import CAST, LORA_TARGETS, SUBSETS, SWITCHES, WanCost

__all__ = [
    "CAST",
    "LORA_TARGETS",
    "SUBSETS",
    "SWITCHES",
    "activations",
    "attention_flops",
    "autoencoder",
    "complete",
    "conditions",
    "default_clip",
    "flops",
    "frozen_parts",
    "heads",
    "parameters",
    "read_config",
    "speech",
    "step",
    "tokens",
]

WHISPER_PARAMETERS = 636_968_960  # the encoder of whisper-large-v3
WINDOW = 21  # latents of a clip, whose audio every frame hears where the model says no window


def _model() -> Any:
    from talkingdit.families.skyreels_audio.model import SkyReelsAudioModel

    return SkyReelsAudioModel


def _translate(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    from talkingdit.families.skyreels_audio.config import ARGUMENTS
    from talkingdit.families.wan_i2v.config import translate

    return translate(values, where, ARGUMENTS)


def _settings(folder: Path | None) -> Any:
    from talkingdit.families.skyreels_audio.checkpoint import SkyReelsAudioSettings, read_settings

    return SkyReelsAudioSettings() if folder is None else read_settings(folder)


def _heard(config: Mapping[str, Any]) -> int:
    """Audio tokens that a latent frame hears."""
    window = config["audio_window"]
    return FRAMES_PER_LATENT * config["audio_layers"] * (WINDOW if window is None else 2 * window + 1)


COST = WanCost(
    title="SkyReels-Audio",
    preset="skyreels_audio",
    presets=PRESETS,
    model=_model,
    translate=_translate,
    settings=_settings,
    audio_tokens=_heard,
    speech_parameters=WHISPER_PARAMETERS,
)
complete, read_config, default_clip = COST.complete, COST.read_config, COST.default_clip
frozen_parts, parameters, heads, tokens = COST.frozen_parts, COST.parameters, COST.heads, COST.tokens
flops, attention_flops, conditions, step = COST.flops, COST.attention_flops, COST.conditions, COST.step
autoencoder, speech, activations = COST.autoencoder, COST.speech, COST.activations
