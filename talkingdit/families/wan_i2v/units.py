# SPDX-License-Identifier: Apache-2.0
"""The structure of the Wan I2V transformer and of those that build on it, see `talkingdit.nn.units`.

Audio attention lies inside of blocks. What makes audio tokens is called `audio_proj` in every family that has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from talkingdit.nn.units import Unit

UNITS: tuple[Unit, ...] = (
    Unit("text_embedding"),
    Unit("img_emb"),
    Unit("audio_proj", float32=True),
    Unit("time_embedding", float32=True),
    Unit("time_projection", float32=True),
    Unit("blocks.*", large=True),
    Unit("head", float32=True),
)
# Layers of the root: called more than once in a forward.
ROOT = ("patch_embedding",)


def walk(config: Mapping[str, Any]) -> list[str]:
    """Paths of the large units in the order in which the forward calls them.

    Args:
        config: arguments of the transformer.
    """
    return [f"blocks.{i}" for i in range(config["num_layers"])]
