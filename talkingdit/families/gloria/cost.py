# SPDX-License-Identifier: Apache-2.0
"""Memory and work of Gloria, see `talkingdit.plan.cost`. A clip is counted with its global anchor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from talkingdit.families.gloria.audio import WINDOW
from talkingdit.families.gloria.load import model_class
from talkingdit.families.gloria.presets import PRESETS
from talkingdit.families.wan_i2v.cost import CAST, LORA_TARGETS, SUBSETS, SWITCHES, WanCost
from talkingdit.families.wan_s2v.cost import SPEECH_PARAMETERS
from talkingdit.plan.clip import ClipShape

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


def _translate(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    from talkingdit.families.gloria.config import translate

    return translate(values, where)


def _settings(folder: Path | None) -> Any:
    from talkingdit.families.gloria.checkpoint import GloriaSettings, read_settings

    return GloriaSettings() if folder is None else read_settings(folder)


def _global_anchor(config: Mapping[str, Any], clip: ClipShape) -> int:
    return (clip.height // 16) * (clip.width // 16)


COST = WanCost(
    title="Gloria",
    preset="gloria_17b",
    presets=PRESETS,
    model=model_class,
    translate=_translate,
    settings=_settings,
    extra=_global_anchor,
    audio_tokens=lambda config: WINDOW,
    speech_parameters=SPEECH_PARAMETERS,
)
complete, read_config, default_clip = COST.complete, COST.read_config, COST.default_clip
frozen_parts, parameters, heads, tokens = COST.frozen_parts, COST.parameters, COST.heads, COST.tokens
flops, attention_flops, conditions, step = COST.flops, COST.attention_flops, COST.conditions, COST.step
autoencoder, speech, activations = COST.autoencoder, COST.speech, COST.activations
