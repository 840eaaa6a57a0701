# SPDX-License-Identifier: Apache-2.0
"""Wan-S2V transformers from every kind of file that holds one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from talkingdit.families.loader import TransformerLoader
from talkingdit.families.wan_s2v import config
from talkingdit.families.wan_s2v.presets import CLASSES


def _model() -> Any:
    from talkingdit.families.wan_s2v.model import WanS2VModel

    return WanS2VModel


def _bare() -> Any:
    from talkingdit.families.wan_s2v.network import BareWanS2V

    return BareWanS2V


def _initialise(model: Any, source: str | Path) -> None:
    from talkingdit.families.wan_s2v.initialise import initialise_from_video_model

    initialise_from_video_model(model, source)


LOADER = TransformerLoader(
    model=_model,
    classes=CLASSES,
    native=config.native,
    complete=config.complete,
    has_shapes=lambda shapes: "casual_audio_encoder.weights" in shapes,
    initialise=_initialise,
)
load, read_config, empty, loads = LOADER.load, LOADER.read_config, LOADER.empty, LOADER.loads
load_bare = dataclasses.replace(LOADER, model=_bare).load  # as `load`, the network alone
