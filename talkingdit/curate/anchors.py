# SPDX-License-Identifier: Apache-2.0
"""Content anchors (Gloria, sections 3 and 6): pictures of a person from four sides and with eight expressions.

A viewpoint is the angle between the body and the camera, by the pose network, or the turn of the head where only that
is to be seen; its picture is the body cut out. An expression needs a classifier (`models.expression`), may be looked at
again by a second model (`models.verify`), and its picture is the head cut out. Global anchors are times; `write.py`
chooses them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import ClipFindings
from talkingdit.errors import UserError

VIEWPOINTS = ("front", "back", "left", "right")
EXPRESSIONS = ("surprise", "angry", "disgust", "fear", "contempt", "neutral", "happy", "sad")
# Degrees by which a body, and a head, may be turned to be seen from the front, or are to be seen from a side or behind.
FRONT, SIDE, BACK = 25.0, (60.0, 120.0), 150.0
HEAD_FRONT, HEAD_SIDE = 15.0, 32.0
SURE_EXPRESSION = 0.5
BODY_MARGIN = 0.1  # around a body that is cut out, in its sizes
# The order of EmotiEffLib's networks of eight classes, and how they see a face.
CLASSES = ("angry", "contempt", "disgust", "fear", "happy", "neutral", "sad", "surprise")
SEEN, MEAN, DEVIATION = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Picture = NDArray[np.uint8]


def viewpoint(body: float | None, head: float | None) -> str | None:
    """The side from which somebody is to be seen; None between two.

    In a close-up the pose network takes the front for the back: a face that is to be seen overrules it.

    Args:
        body: degrees, 0 towards the camera, positive to the right of the picture; None unknown.
        head: the same of the head; None where no face is to be seen.
    """
    if body is not None and (head is None or abs((body + 180) % 360 - 180) <= 90):
        turned = abs((body + 180) % 360 - 180)
        if turned <= FRONT:
            return "front"
        if turned >= BACK:
            return "back"
        if SIDE[0] <= turned <= SIDE[1]:
            return "right" if (body + 180) % 360 - 180 > 0 else "left"
        return None
    if head is None:
        return None
    if abs(head) <= HEAD_FRONT:
        return "front"
    return ("right" if head > 0 else "left") if abs(head) >= HEAD_SIDE else None


def cut_out(picture: Picture, box: NDArray[np.float64], margin: float) -> Picture:
    """A part of a picture with a margin, as far as the picture goes."""
    x0, y0, x1, y1 = (float(side) for side in box)
    wide, high = (x1 - x0) * margin, (y1 - y0) * margin
    height, width = picture.shape[:2]
    left, top = max(0, round(x0 - wide)), max(0, round(y0 - high))
    return picture[top : min(height, round(y1 + high)), left : min(width, round(x1 + wide))]


class Anchors:
    """Finds anchors in the stills of clips.

    Args:
        watch: settings; `models.expression` is an ONNX file of eight classes as EmotiEffLib has them, `models.verify` a
            "module:name" of a callable (picture, expression) -> expression or None.
        head_margin: around a head that is cut out, in its sizes.

    Raises:
        UserError: a model that is given cannot be used.
    """

    def __init__(self, watch: Watch, head_margin: float) -> None:
        self._margin = head_margin
        given = watch.models.get("expression")
        self._classes: Any = None if given is None else _classifier(Path(given).expanduser())
        verify = watch.models.get("verify")
        self._verify: Any = None if verify is None else _named(verify)

    def find(self, look: Look, found: ClipFindings) -> list[tuple[str, float, Picture]]:
        """Kind, seconds of the video, and picture of every anchor of a clip; at most one of a kind.

        Args:
            look: the clip.
            found: what stages found in it.
        """
        anchors: dict[str, tuple[str, float, Picture]] = {}
        person = found.people[0] if len(found.people) == 1 else None
        for number, still in enumerate(look.stills):
            scale = still.picture.shape[0] / look.pictures.shape[1]
            head = body = None
            if person is not None:
                head = person.boxes[still.index].astype(np.float64) * scale
            if number in found.bodies:
                body = np.array(found.bodies[number])
            yaw = None
            if person is not None and person.yaw is not None:
                yaw = float(person.yaw[still.index])
            at = look.start + still.index / look.fps
            view = viewpoint(found.facing.get(number), yaw)
            # Without anybody else in the clip a body without a face is the person, seen from behind.
            alone = len(found.people) <= 1
            whole = body if body is not None else head
            if view is not None and alone and whole is not None and view not in anchors:
                margin = BODY_MARGIN if body is not None else 2 * self._margin
                anchors[view] = view, at, cut_out(still.picture, whole, margin)
            if head is not None and self._classes is not None:
                part = cut_out(still.picture, head, self._margin)
                kind = self._expression(part)
                if kind is not None and kind not in anchors:
                    anchors[kind] = kind, at, part
        return [one for one in anchors.values() if one[2].size]

    def _expression(self, head: Picture) -> str | None:
        import cv2

        if not head.size:
            return None
        seen = cv2.resize(head, (SEEN, SEEN), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        seen = (seen - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
        logits = self._classes.run(None, {self._classes.get_inputs()[0].name: seen.transpose(2, 0, 1)[None]})[0][0]
        likely = np.exp(logits[: len(CLASSES)] - logits.max())
        likely = likely / likely.sum()
        kind: str | None = CLASSES[int(likely.argmax())]
        if likely.max() < SURE_EXPRESSION:
            return None
        if self._verify is not None:
            kind = self._verify(head, kind)
        return kind if kind in EXPRESSIONS else None


def _classifier(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"curate: models.expression: expected an ONNX file, got {str(file)!r}.")
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"curate: models.expression: {file} cannot be used ({error}).") from error


def _named(name: str) -> Any:
    module, _, kind = name.partition(":")
    try:
        return getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"curate: models.verify: expected 'module:name', got {name!r} ({error}).") from error
