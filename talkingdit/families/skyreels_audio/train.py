# SPDX-License-Identifier: Apache-2.0
"""How SkyReels-Audio is trained: as Wan I2V, on two tasks told apart by a mask (section 2.3).

    animate     the first frame is given, and grey behind it
    edit        the whole clip is given but for lower faces; a clip of which these are not known is animated

Where the reference is dropped, nothing is given. Losses and dropout are in `training/configs/skyreels_audio.toml`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from talkingdit.errors import UserError
from talkingdit.families.skyreels_audio.load import LOADER
from talkingdit.families.training import EDITED, TrainBatch, TrainClip, TrainRun
from talkingdit.families.wan_i2v import train as base
from talkingdit.families.wan_i2v.train import MAX_GROUPS, ModelClip, attention_tokens, count_tokens, open_validator

if TYPE_CHECKING:
    from talkingdit.checkpoints.weights import Weights
    from talkingdit.data import Source
    from talkingdit.families.skyreels_audio.model import SkyReelsAudioModel

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

ANIMATE, EDIT = "animate", "edit"
EXTRAS: frozenset[str] = frozenset({ANIMATE, EDIT})


def build_networks(arguments: Mapping[str, Any], text_encoder: str) -> tuple[SkyReelsAudioModel, None]:
    """A transformer with random weights; its text features come with the data.

    Raises:
        UserError: a prompt encoder was asked for.
    """
    from talkingdit.families.skyreels_audio.model import SkyReelsAudioModel

    base.check_text_encoder(text_encoder, "SkyReels-Audio")
    return SkyReelsAudioModel(**arguments), None


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
    _settings(run)


def save(folder: Path, transformer: SkyReelsAudioModel, text_encoder: None, run: TrainRun) -> None:
    """The transformer as `load` reads it, and how generation gives it what it was given."""
    from talkingdit.checkpoints.saving import save_model

    save_model(transformer, folder)
    _settings(run).save(folder / "pipeline.json")


def _settings(run: TrainRun) -> Any:
    from talkingdit.families.skyreels_audio.checkpoint import SkyReelsAudioSettings

    def made(**values: Any) -> Any:
        overlap = min(SkyReelsAudioSettings.overlap, values["chunk_latents"] - 1)
        return SkyReelsAudioSettings(**values, overlap=overlap)

    return base.checked(made, run)


def velocities(transformer: Any, batch: TrainBatch) -> Tensor | Sequence[Tensor]:
    """Velocities of all clips, [n, C, T, H, W] of those of equal shapes, or of each of a packed sequence."""
    return base.velocities_of(transformer, batch, model_clip)


def model_clip(transformer: Any, clip: TrainClip, text: Tensor, device: torch.device) -> ModelClip:
    """What the model is given of a training clip."""
    whole = base.model_clip(transformer, clip, text, device)
    made = clip.regions.get(EDITED)
    if clip.task != EDIT or clip.given is None or made is None or clip.reference is None or clip.prefix:
        return whole
    condition = whole.inputs.condition
    assert condition is not None
    condition, channels = condition.clone(), condition.shape[1] - clip.given.shape[0]
    condition[0, :channels, 1:] = 1 - made.to(condition)
    condition[0, channels:, 1:] = clip.given.to(condition)
    return dataclasses.replace(whole, inputs=dataclasses.replace(whole.inputs, condition=condition))


def open_source(kind: str, name: str, run: TrainRun) -> Source:
    """SkyReels-Audio trains on what every family does.

    Raises:
        UserError: always.
    """
    raise UserError(f"data.sources.{name}.kind: SkyReels-Audio has none of its own, got {kind!r}.")
