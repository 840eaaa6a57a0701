# SPDX-License-Identifier: Apache-2.0
"""Nodes that make videos: from a picture, and over a video. And the sheet that shows one at a glance."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from talkingdit.errors import UserError

from . import host, sockets, widgets
from .conditions import ANCHORS, EMOTIONS, OPTIONS, SPEAKERS, Chosen, box_of
from .loading import MODEL
from .model import Model

RESULT = "TALKINGDIT_RESULT"
OUTPUTS = (("IMAGE", "images"), ("AUDIO", "audio"), ("FLOAT", "fps"), ("VIDEO", "video"), (RESULT, "result"))
Outputs = tuple[Any, Any, float, Any, Any]


def _usual() -> dict[str, Any]:
    """Inputs of every node that makes a video."""
    found: dict[str, Any] = {"prompt": ("STRING", {"default": "", "multiline": True, "tooltip": "what to show"})}
    for one in widgets.common():
        kind, about = widgets.widget(one)
        if one.name == "seed":
            about = {**about, "max": (1 << 63) - 1, "control_after_generate": True}
        found[one.name] = (kind, about)
    return found


FORCE_OFFLOAD = (
    "BOOLEAN",
    {"default": True, "tooltip": "take the models off the GPU afterwards, so that other nodes have room"},
)


class GenerateNode:
    """A picture and a voice become a video."""

    CATEGORY, FUNCTION = "talkingdit", "generate"
    RETURN_TYPES, RETURN_NAMES = (tuple(column) for column in zip(*OUTPUTS, strict=True))
    DESCRIPTION = "A video of a person in a picture who speaks a voice recording."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "image": ("IMAGE", {"tooltip": "the portrait"}),
                **_usual(),
            },
            "optional": {
                "audio": ("AUDIO", {"tooltip": "the voice; left out where speakers bring theirs"}),
                "force_offload": FORCE_OFFLOAD,
                "options": (OPTIONS, {"tooltip": "of the model's family"}),
                "speakers": (SPEAKERS,),
                "emotions": (EMOTIONS,),
                "anchors": (ANCHORS,),
            },
        }

    @host.outside_inference_mode
    def generate(
        self,
        model: Model,
        image: Any,
        audio: Any = None,
        force_offload: bool = True,
        options: Chosen | None = None,
        speakers: tuple[Any, ...] = (),
        emotions: tuple[Any, ...] = (),
        anchors: tuple[Any, ...] = (),
        **usual: Any,
    ) -> Outputs:
        given = {"speaker": list(speakers), "emotion": list(emotions), "anchor": dict(anchors)}
        materials = {"image": sockets.picture_of(image)}
        if audio is not None:
            materials["audio"] = sockets.sound_of(audio)
        asked = {name: value for name, value in given.items() if value}
        return make(model, {**materials, **said(model, usual, options), **asked}, force_offload)


class DubNode:
    """A video whose mouth is made to speak another voice; all else stays as it is."""

    CATEGORY, FUNCTION = "talkingdit", "dub"
    RETURN_TYPES, RETURN_NAMES = GenerateNode.RETURN_TYPES, GenerateNode.RETURN_NAMES
    DESCRIPTION = "A video whose mouth is made to speak another voice (SkyReels-Audio); all else stays as it is."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "video": ("VIDEO", {"tooltip": "whose mouth is changed"}),
                "audio": ("AUDIO", {"tooltip": "the new voice"}),
                **_usual(),
            },
            "optional": {
                "mask": ("MASK", {"tooltip": "where the video may change; without one, faces are found"}),
                "box": ("STRING", {"default": "", "placeholder": "x0,y0,x1,y1", "tooltip": "the same, in pixels"}),
                "force_offload": FORCE_OFFLOAD,
                "options": (OPTIONS, {"tooltip": "of the model's family"}),
            },
        }

    @host.outside_inference_mode
    def dub(
        self,
        model: Model,
        video: Any,
        audio: Any,
        mask: Any = None,
        box: str = "",
        force_offload: bool = True,
        options: Chosen | None = None,
        **usual: Any,
    ) -> Outputs:
        if mask is not None and box.strip():
            raise UserError("mask: expected a MASK or a box, got both.")
        asked = {"audio": sockets.sound_of(audio), **said(model, usual, options)}
        with contextlib.ExitStack() as files:
            asked["video"] = files.enter_context(_file_of(video, "video"))
            if mask is not None:
                asked["mask"] = files.enter_context(_picture_file(sockets.mask_of(mask)))
            elif box.strip():
                asked["mask"] = ",".join(f"{side:g}" for side in box_of(box, "mask"))
            return make(model, asked, force_offload)


class SheetNode:
    """A video at a glance: frames, the waveform, and what its family measures."""

    CATEGORY, FUNCTION = "talkingdit", "draw"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("image",)
    DESCRIPTION = "Frames, the waveform and the curve of the mouth of a video, in one picture."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"result": (RESULT,)}}

    def draw(self, result: Any) -> tuple[Any]:
        from talkingdit.media.image import read_image

        path = host.scratch_file(".png")
        try:
            result.sheet(path)
            return (sockets.image_of(read_image(path)[None]),)
        finally:
            path.unlink(missing_ok=True)


def said(model: Model, usual: Mapping[str, Any], options: Chosen | None) -> dict[str, Any]:
    """Prompt, seed, steps and options of a family, as a pipeline takes them.

    Raises:
        UserError: the options are another family's.
    """
    if options is not None and options.family.name != model.family.name:
        raise UserError(
            f"options: expected those of {model.family.title}, the family of the checkpoint, "
            f"got those of {options.family.title}."
        )
    common = {one.name: usual[one.name] for one in widgets.common() if not widgets.is_default(one, usual[one.name])}
    return {"prompt": usual["prompt"], **common, **(options.values if options is not None else {})}


def make(model: Model, asked: Mapping[str, Any], force_offload: bool) -> Outputs:
    """A video, as all outputs of a node.

    Raises:
        UserError: something that was asked for is not good.
    """
    report = host.progress()
    try:
        with contextlib.ExitStack() as files:
            asked = {
                name: files.enter_context(_file_of(value, name)) if hasattr(value, "get_components") else value
                for name, value in asked.items()
            }
            model.slot.check(asked)
            pipe = model.slot.ready(model.loras)
            result = pipe(**asked, progress=report, warn=logging.getLogger("talkingdit").warning)
    finally:
        if force_offload:
            model.slot.leave()
    samples, rate = result.audio
    path = host.scratch_file(".mp4")
    result.save(path)
    video = host.video_of_file(path, owned=True)
    return sockets.image_of(result.frames), sockets.audio_of(samples, rate), float(result.fps), video, result


@contextlib.contextmanager
def _file_of(video: Any, name: str) -> Iterator[Path]:
    """A VIDEO as a file, for as long as it is needed."""
    path, ours = sockets.file_of_video(video, name)
    try:
        yield path
    finally:
        if ours:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _picture_file(pixels: Any) -> Iterator[Path]:
    """A picture as a file, for as long as it is needed."""
    from PIL import Image

    path = host.scratch_file(".png")
    try:
        Image.fromarray(pixels).save(path)
        yield path
    finally:
        path.unlink(missing_ok=True)
