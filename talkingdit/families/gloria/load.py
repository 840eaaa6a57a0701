# SPDX-License-Identifier: Apache-2.0
"""Transformers of Gloria from every kind of file that holds one."""

from __future__ import annotations

from typing import Any

from talkingdit.families.gloria.config import complete
from talkingdit.families.gloria.presets import CLASSES
from talkingdit.families.wan_i2v.load import loader


def model_class() -> Any:
    from talkingdit.families.gloria.model import GloriaModel

    return GloriaModel


LOADER = loader(model_class, CLASSES, complete, mark="audio_proj.place")
load, read_config, empty, loads = LOADER.load, LOADER.read_config, LOADER.empty, LOADER.loads
