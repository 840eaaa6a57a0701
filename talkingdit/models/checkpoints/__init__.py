# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole folders for generation, single transformers, LoRA files; loading, saving, converting.

Everything streams: tensors go to the device one by one, and what does not fit is said in one sentence.
"""

from talkingdit.models.checkpoints.initialise import InitReport, initialise_from_video_model
from talkingdit.models.checkpoints.lora import LoraReport, Loras
from talkingdit.models.checkpoints.puppet import (
    Checkpoint,
    PipelineSettings,
    default_checkpoint,
    save_checkpoint,
)
from talkingdit.models.checkpoints.s2v import S2VCheckpoint, S2VSettings
from talkingdit.models.checkpoints.save import save_official
from talkingdit.models.checkpoints.transformer import load, read_config
from talkingdit.models.checkpoints.whole import load_checkpoint

__all__ = [
    "Checkpoint",
    "InitReport",
    "LoraReport",
    "Loras",
    "PipelineSettings",
    "S2VCheckpoint",
    "S2VSettings",
    "default_checkpoint",
    "initialise_from_video_model",
    "load",
    "load_checkpoint",
    "read_config",
    "save_checkpoint",
    "save_official",
]
