# SPDX-License-Identifier: Apache-2.0
"""What is measured of a clip: a class each, figures out.

A stage is made once per process, with the settings, and asked once per clip. What an earlier stage has found, a later
one uses: `ClipFindings`. Figures are numbers, texts or lists under dotted names; a limit of the settings goes by such a
name.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.errors import UserError

Figures = dict[str, Any]


@dataclass
class Person:
    """Somebody who is followed through a clip.

    Args:
        boxes: float32 [F, 4], x0, y0, x1, y1 of the face in pixels of the small pictures, filled in between where it
            was found.
        presence: share of the pictures in which faces were searched where this one was found.
        roll: float32 [F], radians by which the eyes are turned.
        opening, yaw, likely: float32 [F] of the mouth, degrees of the head, and how much it looks like a face.
        mouth: float32 [F, 4], box around the lips.
        speaking: float32 [F], scores of the slot `light_asd`; above 0 this one speaks.
    """

    boxes: NDArray[np.float32]
    presence: float
    roll: NDArray[np.float32]
    opening: NDArray[np.float32] | None = None
    mouth: NDArray[np.float32] | None = None
    yaw: NDArray[np.float32] | None = None
    likely: NDArray[np.float32] | None = None
    speaking: NDArray[np.float32] | None = None


@dataclass
class ClipFindings:
    """What stages have found in a clip so far.

    Args:
        people: largest face first.
        spoken: seconds (from, to) in which somebody speaks.
        hands: of stills, (number of the still, x0, y0, x1, y1 in pixels of the still).
        bodies: boxes of the person by the number of the still, in pixels of the still.
        facing: degrees of the body by the number of the still; see `detect.pose`.
    """

    people: list[Person] = field(default_factory=list)
    spoken: list[tuple[float, float]] = field(default_factory=list)
    hands: list[tuple[int, float, float, float, float]] = field(default_factory=list)
    bodies: dict[int, tuple[float, float, float, float]] = field(default_factory=dict)
    facing: dict[int, float] = field(default_factory=dict)

    def packed(self) -> bytes:
        """All of it in few bytes, for a stage that is added later."""
        curves: dict[str, Any] = {}
        for number, person in enumerate(self.people):
            told = {name: value for name, value in vars(person).items() if value is not None}
            curves |= {f"{number} {name}": np.asarray(value) for name, value in told.items()}
        rest = {"spoken": self.spoken, "hands": self.hands, "people": len(self.people)}
        rest |= {"bodies": list(self.bodies.items()), "facing": list(self.facing.items())}
        file = io.BytesIO()
        np.savez_compressed(file, rest=np.array(json.dumps(rest, default=float)), **curves)
        return file.getvalue()

    @staticmethod
    def unpacked(data: bytes) -> ClipFindings:
        """What was `packed`."""
        with np.load(io.BytesIO(data)) as held:
            rest = json.loads(str(held["rest"]))
            told: list[dict[str, Any]] = [{} for _ in range(rest["people"])]
            for key in held.files:
                number, _, name = key.partition(" ")
                if name:
                    told[int(number)][name] = held[key] if held[key].ndim else float(held[key])
        return ClipFindings(
            people=[Person(**one) for one in told],
            spoken=[(begin, end) for begin, end in rest["spoken"]],
            hands=[(int(still), *box) for still, *box in rest["hands"]],
            bodies={int(still): tuple(box) for still, box in rest["bodies"]},
            facing={int(still): float(angle) for still, angle in rest["facing"]},
        )


class MeasuringStage(Protocol):
    """Measures clips.

    `gpu` says that it wants a card: such stages run together, in workers of their own. `alone`, which it may have, says
    that it finds nothing that other stages use: added to a folder of results, it runs by itself. `version`, 1 where it
    has none, changes whenever its figures may. A stage of a slot has its name as `slot`, and is told the name of its
    weights as `backbone`.
    """

    gpu: bool

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        """Figures of a clip."""


# Names of the settings, and where the class of each is.
STAGES = {
    "picture": "talkingdit.curate.stages.picture:PictureStage",
    "people": "talkingdit.curate.stages.people:PeopleStage",
    "body": "talkingdit.curate.stages.body:BodyStage",
    "sharpness": "talkingdit.curate.stages.picture:SharpnessStage",
    "motion": "talkingdit.curate.stages.picture:MotionStage",
    "text": "talkingdit.curate.stages.picture:TextStage",
    "speech": "talkingdit.curate.stages.sound:SpeechStage",
    "voices": "talkingdit.curate.stages.sound:VoicesStage",
    "sync": "talkingdit.curate.stages.sync:SyncStage",
    "syncnet": "talkingdit.curate.stages.talking:SyncnetStage",
    "light_asd": "talkingdit.curate.stages.talking:LightAsdStage",
    "language": "talkingdit.curate.stages.slots:LanguageStage",
    "caption": "talkingdit.curate.stages.slots:CaptionStage",
    "signature": "talkingdit.curate.stages.signature:SignatureStage",
}

FIND = ("people", "body", "speech")  # of these, stages that find what others use


def is_alone(name: str) -> bool:
    """Does no other stage use what this one finds?"""
    return bool(getattr(stage_of(name), "alone", name in STAGES and name not in FIND))


def stage_of(name: str) -> type[Any]:
    """The class of a stage: a name of `STAGES`, or "module:Class".

    Raises:
        UserError: there is none.
    """
    module, _, kind = STAGES.get(name, name).partition(":")
    try:
        found: type[Any] = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(STAGES)
        raise UserError(f"curate: expected a stage of {known}, or 'module:Class', got {name!r} ({error}).") from error
    return found


def make_stages(
    watch: Watch, gpu: bool | None = None, names: Mapping[str, str] | None = None
) -> tuple[dict[str, MeasuringStage], dict[str, str]]:
    """The stages of the settings, and of those that lack a model what to install or to give.

    Args:
        watch: settings.
        gpu: only those that want a card, or only the others.
        names: of the weights by slot, with which figures are signed.

    Raises:
        UserError: there is no such stage, or what is given for a slot cannot be used.
    """
    from talkingdit.detect.packages import NotInstalledError

    made: dict[str, MeasuringStage] = {}
    lacking: dict[str, str] = {}
    for name in watch.stages:
        kind = stage_of(name)
        if gpu is not None and bool(getattr(kind, "gpu", False)) != gpu:
            continue
        try:
            made[name] = stage = kind(watch)
            if names and getattr(kind, "slot", "") in names:
                stage.backbone = names[kind.slot]
        except NotInstalledError as error:
            lacking[name] = str(error)
    return made, lacking
