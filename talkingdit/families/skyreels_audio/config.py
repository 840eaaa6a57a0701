# SPDX-License-Identifier: Apache-2.0
"""SkyReels-Audio transformers as checkpoints write them: settings said, or told by the shapes of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from talkingdit.checkpoints.bounds import check_bounds
from talkingdit.checkpoints.weights import Weights
from talkingdit.errors import UserError
from talkingdit.families.skyreels_audio.presets import PRESETS
from talkingdit.families.wan_i2v import config as base

RELEASED = PRESETS["skyreels_audio"]
ARGUMENTS = {*RELEASED, *base.COMPUTING}


def complete(values: Mapping[str, Any], weights: Weights, where: object) -> dict[str, Any]:
    """Arguments of `SkyReelsAudioModel` for a config.json and the weights (native names) that lie beside it.

    Raises:
        UserError: a setting that this model cannot follow, or weights of a model that does not hear.
    """
    check_bounds(dict(values), where)
    said = base.translate(values, where, ARGUMENTS)
    found = base.from_shapes(weights.shapes, said, where)
    if "audio_proj.1.weight" not in weights.shapes:
        raise UserError(f"{where}: no audio_proj in it; not the weights of a SkyReels-Audio transformer.")
    found["audio_dim"] = weights.shapes["audio_proj.1.weight"][1]
    return base.as_tuples({**RELEASED, **found, **said})
