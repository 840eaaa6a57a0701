# SPDX-License-Identifier: Apache-2.0
"""Which family of models a configuration trains, and what the family is told of the run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from talkingdit import families
from talkingdit.families import Family, preset
from talkingdit.families.training import TrainRun, ValidationSettings
from training.config import Config


def family_of(config: Config) -> Family:
    """The family of `model.family`, or of the preset where that is empty.

    Raises:
        UserError: there is no such family or preset.
    """
    if config.model.family:
        return families.get(config.model.family)
    family = families.of_preset(config.model.preset)
    # Configurations from before the key told two families that share their transformers apart by the text encoder.
    if family.name in ("puppet", "wan_s2v"):
        return families.get("puppet" if config.model.text_encoder == "prompt" else "wan_s2v")
    return family


def settings_of(config: Config) -> dict[str, Any]:
    """Arguments of the transformer.

    Raises:
        ValueError: there is no such preset.
    """
    return preset(config.model.preset, **config.model.settings)


def train_run(config: Config) -> TrainRun:
    """What the family is told of the run."""
    sample = asdict(config.sample)
    del sample["every"]
    return TrainRun(
        out=config.run.out,
        seed=config.run.seed,
        clip_latents=config.model.clip_latents,
        audio_context=config.model.audio_context,
        shift=config.stages[-1].objective.shift,
        validation=ValidationSettings(**sample),
        data=vars(config.data),
    )
