# SPDX-License-Identifier: Apache-2.0
"""Transformers of Gloria as checkpoints write them: settings said, or told by the shapes of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from talkingdit.checkpoints.bounds import check_bounds
from talkingdit.checkpoints.weights import Weights
from talkingdit.errors import UserError
from talkingdit.families.gloria.presets import PRESETS
from talkingdit.families.wan_i2v import config as wan

RELEASED = PRESETS["gloria_17b"]
ARGUMENTS = {*RELEASED, *wan.COMPUTING}


def translate(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Arguments of `GloriaModel` that a config.json says; UserError for a variant that is not supported."""
    return wan.translate(values, where, ARGUMENTS)


def complete(values: Mapping[str, Any], weights: Weights, where: object) -> dict[str, Any]:
    """See `talkingdit.families.wan_i2v.config.complete`."""
    check_bounds(dict(values), where)
    said, shapes = translate(values, where), weights.shapes
    found = wan.from_shapes(shapes, said, where)
    try:
        width, dim = shapes["audio_proj.project.1.weight"]
        found |= {"audio_width": width, "audio_dim": dim, "audio_layers": shapes["audio_proj.layers"][0]}
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{where}: not the weights of a Gloria transformer (no usable audio_proj in it).") from None
    return wan.as_tuples({**RELEASED, **found, **said})
