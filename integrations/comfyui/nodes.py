# SPDX-License-Identifier: Apache-2.0
"""All nodes by the names that workflows keep. A name is never used for anything else."""

from __future__ import annotations

from talkingdit import families

from .conditions import AnchorNode, EmotionNode, SpeakerNode, options_node
from .generating import DubNode, GenerateNode, SheetNode
from .loading import AccelerateNode, LoadLoraNode, LoadNode

_NODES = {
    "TalkingDiTLoad": (LoadNode, "talkingdit: load"),
    "TalkingDiTLora": (LoadLoraNode, "talkingdit: LoRA"),
    "TalkingDiTGenerate": (GenerateNode, "talkingdit: generate"),
    "TalkingDiTDub": (DubNode, "talkingdit: dub"),
    "TalkingDiTSpeaker": (SpeakerNode, "talkingdit: speaker"),
    "TalkingDiTEmotion": (EmotionNode, "talkingdit: emotion"),
    "TalkingDiTAnchor": (AnchorNode, "talkingdit: anchor"),
    "TalkingDiTSheet": (SheetNode, "talkingdit: sheet"),
    "TalkingDiTAccelerate": (AccelerateNode, "talkingdit: accelerate a Wan model"),
    **{
        f"TalkingDiTOptions_{family.name}": (options_node(family), f"talkingdit: options of {family.title}")
        for family in map(families.get, families.names())
    },
}

CLASSES = {name: kind for name, (kind, _) in _NODES.items()}
TITLES = {name: title for name, (_, title) in _NODES.items()}
