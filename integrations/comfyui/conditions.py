# SPDX-License-Identifier: Apache-2.0
"""Nodes for what there may be several of: speakers, emotions, anchors. Each adds one to those before it on its wire.

And one node of options for every family, made from the family's dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from talkingdit import families
from talkingdit.errors import UserError
from talkingdit.families import Family

from . import sockets, widgets

SPEAKERS, EMOTIONS, ANCHORS, OPTIONS = (f"TALKINGDIT_{word}" for word in ("SPEAKERS", "EMOTIONS", "ANCHORS", "OPTIONS"))


class SpeakerNode:
    """Who speaks, with which voice, and where the face is: a mask, a box, or found from left to right."""

    CATEGORY, FUNCTION = "talkingdit", "add"
    RETURN_TYPES, RETURN_NAMES = (SPEAKERS,), ("speakers",)
    DESCRIPTION = "A person in a picture of several (HunyuanVideo-Avatar): a voice, and a mask or a box of the face."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"name": ("STRING", {"default": "left", "tooltip": "of the person; each has another"})},
            "optional": {
                "audio": ("AUDIO", {"tooltip": "the voice; left out where turns divide one recording"}),
                "mask": ("MASK", {"tooltip": "of the size of the picture, white on the face"}),
                "box": ("STRING", {"default": "", "placeholder": "x0,y0,x1,y1", "tooltip": "of the face, in pixels"}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05, "round": False}),
                "speakers": (SPEAKERS, {"tooltip": "those before"}),
            },
        }

    def add(
        self,
        name: str,
        audio: Any = None,
        mask: Any = None,
        box: str = "",
        strength: float = 1.0,
        speakers: tuple[Any, ...] = (),
    ) -> tuple[Any]:
        who = f"speaker {name}"
        speaker: dict[str, Any] = {"name": name.strip(), "strength": float(strength)}
        if audio is not None:
            speaker["voice"] = sockets.sound_of(audio, who)
        if mask is not None:
            speaker["mask"] = sockets.mask_of(mask, who)
        if box.strip():
            speaker["box"] = box_of(box, who)
        return ((*speakers, speaker),)


class EmotionNode:
    """What the face should show, from when to when."""

    CATEGORY, FUNCTION = "talkingdit", "add"
    RETURN_TYPES, RETURN_NAMES = (EMOTIONS,), ("emotions",)
    DESCRIPTION = "A picture of an expression that the face follows for some time (HunyuanVideo-Avatar)."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        seconds = {"min": 0.0, "max": 86400.0, "step": 0.1, "round": False}
        return {
            "required": {
                "image": ("IMAGE",),
                "start": ("FLOAT", {"default": 0.0, **seconds, "tooltip": "in seconds"}),
                "end": ("FLOAT", {"default": 0.0, **seconds, "tooltip": "in seconds; 0: to the end of the video"}),
            },
            "optional": {"emotions": (EMOTIONS, {"tooltip": "those before; where two overlap, the later node counts"})},
        }

    def add(self, image: Any, start: float, end: float, emotions: tuple[Any, ...] = ()) -> tuple[Any]:
        picture = sockets.picture_of(image, f"emotion {len(emotions) + 1}")
        return ((*emotions, {"picture": picture, "start": float(start), "end": float(end) or math.inf}),)


class AnchorNode:
    """A frame that shows the character: from a side, or with an expression."""

    CATEGORY, FUNCTION = "talkingdit", "add"
    RETURN_TYPES, RETURN_NAMES = (ANCHORS,), ("anchors",)
    DESCRIPTION = "A picture of the character from one side or with one expression (Gloria)."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kinds = families.get("gloria").part("anchors").KINDS
        names = [kind if kind == type_ else f"{type_}/{kind}" for type_, row in kinds.items() for kind in row]
        return {
            "required": {"image": ("IMAGE",), "shows": (names, {"tooltip": "what; each may be given once"})},
            "optional": {"anchors": (ANCHORS, {"tooltip": "those before"})},
        }

    def add(self, image: Any, shows: str, anchors: tuple[Any, ...] = ()) -> tuple[Any]:
        if any(shows == name for name, _ in anchors):
            raise UserError(f"anchor {shows}: expected one picture of each kind, got two.")
        return ((*anchors, (shows, sockets.picture_of(image, f"anchor {shows}"))),)


def box_of(words: str, name: str) -> tuple[float, float, float, float]:
    """A box x0,y0,x1,y1 in pixels.

    Raises:
        UserError: something else.
    """
    from talkingdit.media.boxes import read_box

    box = read_box(words)
    if box is None:
        raise UserError(f"{name}: expected a box x0,y0,x1,y1 in pixels, got {words!r}.")
    return box


# ---- Options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Options of a family that were said, by the names of its fields."""

    family: Family
    values: Mapping[str, Any]


def options_node(family: Family) -> type[Any]:
    """The node with the options of a family."""

    class Options:
        CATEGORY, FUNCTION = "talkingdit/options", "choose"
        RETURN_TYPES, RETURN_NAMES = (OPTIONS,), ("options",)
        DESCRIPTION = f"What may be said about a video of {family.title}, besides the usual."

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            videos = {
                one.name: ("VIDEO", {"tooltip": one.help}) for one in widgets.own(family) if widgets.is_video(one)
            }
            others = {one.name: widgets.widget(one) for one in widgets.own(family) if not widgets.is_video(one)}
            return {"required": {}, "optional": {**others, **videos}}

        @classmethod
        def IS_CHANGED(cls, **given: Any) -> str:
            """Files that are read are part of what was said."""
            from .model import state_of

            known = {name: value for name, value in given.items() if value is not None}
            read = [value for value in widgets.values(family, known).values() if hasattr(value, "exists")]
            return " ".join(state_of(path) for path in read if path.exists())

        def choose(self, **given: Any) -> tuple[Chosen]:
            videos = {one.name: given[one.name] for one in widgets.own(family) if _is_given(one, given)}
            return (Chosen(family, {**widgets.values(family, given), **videos}),)

    Options.__name__ = f"Options_{family.name}"
    return Options


def _is_given(field: widgets.Field, given: Mapping[str, Any]) -> bool:
    return widgets.is_video(field) and given.get(field.name) is not None
