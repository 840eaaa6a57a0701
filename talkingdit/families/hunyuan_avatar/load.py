# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo-Avatar transformers from every kind of file that holds one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from talkingdit.families.hunyuan_avatar import config
from talkingdit.families.hunyuan_avatar.presets import CLASSES
from talkingdit.families.loader import TransformerLoader


def _model() -> Any:
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel

    return HunyuanAvatarModel


def _initialise(model: Any, source: str | Path) -> None:
    from talkingdit.families.hunyuan_avatar.initialise import initialise_from_video_model

    initialise_from_video_model(model, source)


LOADER = TransformerLoader(
    model=_model,
    classes=CLASSES,
    native=config.native,
    complete=config.complete,
    has_shapes=lambda shapes: config.MARK in shapes,
    initialise=_initialise,
    released=config.released_file,
)
load, read_config, empty, loads = LOADER.load, LOADER.read_config, LOADER.empty, LOADER.loads
