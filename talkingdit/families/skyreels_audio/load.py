# SPDX-License-Identifier: Apache-2.0
"""SkyReels-Audio transformers from folders, files and presets."""

from __future__ import annotations

from typing import Any

from talkingdit.families.skyreels_audio.config import complete
from talkingdit.families.skyreels_audio.presets import CLASSES
from talkingdit.families.wan_i2v.load import loader


def _model() -> Any:
    from talkingdit.families.skyreels_audio.model import SkyReelsAudioModel

    return SkyReelsAudioModel


LOADER = loader(_model, CLASSES, complete, mark="audio_proj.1.")
load, read_config, empty, loads = LOADER.load, LOADER.read_config, LOADER.empty, LOADER.loads
