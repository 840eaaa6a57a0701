# SPDX-License-Identifier: Apache-2.0
"""Wan I2V transformers, and those of families that build on it, from every kind of file that holds one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from talkingdit.families.loader import Shapes, TransformerLoader
from talkingdit.families.wan_i2v import config
from talkingdit.families.wan_i2v.presets import CLASSES, names_model


def _initialise(model: Any, source: str | Path) -> None:
    from talkingdit.families.wan_i2v.initialise import initialise_from_video_model

    initialise_from_video_model(model, source)


def _has_shapes(shapes: Shapes, mark: str, never: str) -> bool:
    """Is a name with the mark there, none of another family, and are there channels for what is known?"""
    if any(name.startswith(never) for name in shapes) or not any(name.startswith(mark) for name in shapes):
        return False
    return shapes["patch_embedding.weight"][1] > shapes["head.head.weight"][0] // 4


def loader(
    model: Callable[[], Any],
    classes: tuple[str, ...],
    complete: Callable[..., dict[str, Any]],
    mark: str,
    never: str = "casual_audio_encoder.",
) -> TransformerLoader:
    """The loader of a family.

    Args:
        model, classes, complete: see `TransformerLoader`.
        mark: how the name of a weight begins that a single file must hold to be of this family.
        never: how names begin that such a file has none of.
    """
    return TransformerLoader(
        model=model,
        classes=classes,
        native=config.native,
        complete=complete,
        has_shapes=partial(_has_shapes, mark=mark, never=never),
        initialise=_initialise,
        says=lambda values: names_model(values, classes),
    )


def _model() -> Any:
    from talkingdit.families.wan_i2v.model import WanI2VModel

    return WanI2VModel


LOADER = loader(_model, CLASSES, config.complete, mark="patch_embedding.", never="audio_proj.")
load, read_config, empty, loads = LOADER.load, LOADER.read_config, LOADER.empty, LOADER.loads
