# SPDX-License-Identifier: Apache-2.0
"""The models: thin PyTorch on top of ops and nn, with the parameter names of the released checkpoints."""

from talkingdit.models.checkpoints import load
from talkingdit.models.presets import PRESETS, preset
from talkingdit.models.text import PromptEncoder, TextFeatures
from talkingdit.models.wan import WanS2VModel
from talkingdit.models.wan_conditions import WanConditions
from talkingdit.models.wan_packed import PackedClip
from talkingdit.models.wan_sequence import tokens_of

__all__ = [
    "PRESETS",
    "PackedClip",
    "PromptEncoder",
    "TextFeatures",
    "WanConditions",
    "WanS2VModel",
    "load",
    "preset",
    "tokens_of",
]
