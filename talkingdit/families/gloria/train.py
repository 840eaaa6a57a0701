# SPDX-License-Identifier: Apache-2.0
"""How Gloria is trained: as Wan I2V, with anchors and audio."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.errors import UserError
from talkingdit.families.gloria.load import LOADER
from talkingdit.families.training import ANCHORS, TrainRun
from talkingdit.families.wan_i2v.train import (
    MAX_GROUPS,
    attention_tokens,
    check_text_encoder,
    checked,
    open_validator,
    velocities,
)

if TYPE_CHECKING:
    from talkingdit.checkpoints.weights import Weights
    from talkingdit.data import Source
    from talkingdit.families.gloria.model import GloriaModel

__all__ = [
    "EXTRAS",
    "MAX_GROUPS",
    "attention_tokens",
    "build_networks",
    "check_export",
    "count_tokens",
    "lacks_layers",
    "open_source",
    "open_validator",
    "open_weights",
    "save",
    "velocities",
]

EXTRAS: frozenset[str] = frozenset({ANCHORS})


def build_networks(arguments: Mapping[str, Any], text_encoder: str) -> tuple[GloriaModel, None]:
    """A transformer with random weights; its text features come with the data.

    Raises:
        UserError: a prompt encoder was asked for.
    """
    from talkingdit.families.gloria.model import GloriaModel

    check_text_encoder(text_encoder, "Gloria")
    return GloriaModel(**arguments), None


def open_weights(folder: Path) -> Weights:
    """Weights of any kind of checkpoint that `load` takes, under their native names."""
    return LOADER.open_transformer(folder)[0]


def lacks_layers(folder: Path) -> bool:
    """Is this a Wan video model (T2V, I2V), without audio layers?"""
    from talkingdit.families.wan_i2v.initialise import NEW
    from talkingdit.families.wan_s2v.initialise import open_video_model

    return not any(NEW.match(name) for name in open_video_model(folder).shapes)


def check_export(arguments: Mapping[str, Any], text_encoder: str, run: TrainRun) -> None:
    """Whether `save` will find settings that generation takes; UserError where not."""
    from talkingdit.families.gloria.checkpoint import GloriaSettings

    checked(GloriaSettings, run)


def save(folder: Path, transformer: GloriaModel, text_encoder: None, run: TrainRun) -> None:
    """The transformer as `load` reads it, and how generation gives it what it was given."""
    from talkingdit.checkpoints.saving import save_model
    from talkingdit.families.gloria.checkpoint import GloriaSettings

    save_model(transformer, folder)
    checked(GloriaSettings, run).save(folder / "pipeline.json")


def count_tokens(config: Mapping[str, Any], frames: int, height: int, width: int, reference: bool, history: int) -> int:
    """Tokens of a clip: its own, those of its first frame, and those of a global anchor."""
    return (frames + 2 * bool(reference)) * (height // 2) * (width // 2)


def open_source(kind: str, name: str, run: TrainRun) -> Source:
    """Gloria trains on what every family does.

    Raises:
        UserError: always.
    """
    raise UserError(f"data.sources.{name}.kind: Gloria has none of its own, got {kind!r}.")
