# SPDX-License-Identifier: Apache-2.0
"""The structure of the HunyuanVideo-Avatar transformer, see `talkingdit.nn.units`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from talkingdit.nn.units import Unit

UNITS: tuple[Unit, ...] = (
    Unit("audio_proj"),
    Unit("motion_exp", float32=True),
    Unit("motion_pose", float32=True),
    Unit("vector_in", float32=True),
    Unit("fps_proj", float32=True),
    Unit("time_in", float32=True),
    Unit("txt_in"),
    Unit("double_blocks.*", large=True),
    Unit("audio_adapter_blocks.*", large=True),
    Unit("emotion_adapter_blocks.*", large=True),
    Unit("single_blocks.*", large=True),
    Unit("final_layer", float32=True),
)
# Layers of the root: small, called more than once in a forward, or not in every one, as conditions come and go.
ROOT = ("img_in", "ref_in", "before_proj", "emotion_in")


def hears(block: int) -> bool:
    """Is audio (and emotion) added after this double block? Every second one."""
    return block % 2 == 1


def walk(config: Mapping[str, Any]) -> list[str]:
    """Paths of the large units in the order in which the forward calls them.

    Args:
        config: arguments of the transformer.
    """
    paths = []
    for i in range(config["depth_double_blocks"]):
        paths.append(f"double_blocks.{i}")
        if hears(i):
            paths.append(f"audio_adapter_blocks.{i // 2}")
            if config.get("emotion"):
                paths.append(f"emotion_adapter_blocks.{i // 2}")
    return paths + [f"single_blocks.{i}" for i in range(config["depth_single_blocks"])]
