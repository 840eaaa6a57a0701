# SPDX-License-Identifier: Apache-2.0
"""All nodes by the names that workflows keep. A name is never used for anything else."""

from __future__ import annotations

from talkingdit import families

from .conditions import Anchor, Emotion, Speaker, options_node
from .generating import Dub, Generate, Sheet
from .loading import Accelerate, Load, LoadLora

_NODES = {
    "TalkingDiTLoad": (Load, "talkingdit: load"),
    "TalkingDiTLora": (LoadLora, "talkingdit: LoRA"),
    "TalkingDiTGenerate": (Generate, "talkingdit: generate"),
    "TalkingDiTDub": (Dub, "talkingdit: dub"),
    "TalkingDiTSpeaker": (Speaker, "talkingdit: speaker"),
    "TalkingDiTEmotion": (Emotion, "talkingdit: emotion"),
    "TalkingDiTAnchor": (Anchor, "talkingdit: anchor"),
    "TalkingDiTSheet": (Sheet, "talkingdit: sheet"),
    "TalkingDiTAccelerate": (Accelerate, "talkingdit: accelerate a Wan model"),
    **{
        f"TalkingDiTOptions_{family.name}": (options_node(family), f"talkingdit: options of {family.title}")
        for family in map(families.get, families.names())
    },
}

CLASSES = {name: kind for name, (kind, _) in _NODES.items()}
TITLES = {name: title for name, (_, title) in _NODES.items()}
