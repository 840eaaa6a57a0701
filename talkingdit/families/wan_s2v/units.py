# SPDX-License-Identifier: Apache-2.0
"""The structure of the Wan-S2V transformer, see `talkingdit.nn.units`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from talkingdit.nn.units import Unit

UNITS: tuple[Unit, ...] = (
    Unit("text_embedding"),
    Unit("casual_audio_encoder", float32=True),
    Unit("audio_injector.injector_adain_layers.*"),
    Unit("time_embedding", float32=True),
    Unit("time_projection", float32=True),
    Unit("blocks.*", large=True),
    Unit("audio_injector.injector.*", large=True),
    Unit("head", float32=True),
)
# Layers of the root: small, called more than once in a forward, or not in every one, as conditions come and go.
ROOT = ("patch_embedding", "cond_encoder", "trainable_cond_mask", "frame_packer")


def walk(config: Mapping[str, Any]) -> list[str]:
    """Paths of the large units in the order in which the forward calls them: blocks, and what hears audio behind them.

    Args:
        config: arguments of the transformer.
    """
    index = list(config["audio_inject_layers"])
    paths = []
    for i in range(config["num_layers"]):
        paths.append(f"blocks.{i}")
        if i in index:
            paths.append(f"audio_injector.injector.{index.index(i)}")
    return paths
