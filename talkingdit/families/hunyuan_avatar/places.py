# SPDX-License-Identifier: Apache-2.0
"""Which part of the picture everybody who speaks moves.

A part is a box, a picture that is bright where the face is, or a face that is found. Rules:

- speakers without a box or a mask get the faces that are found, left to right, without those that a given box or mask
  holds. Of more faces than speakers the largest are taken; the other people stay silent;
- the masked area is three times as wide and high as a face that is found, as in the released program, and ends
  halfway to the next face; a given box or mask is taken as it is;
- one speaker and no face to be found moves the whole picture, as released. Several need a face each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.speakers import Speaker
from talkingdit.media.boxes import Box

Mask = NDArray[np.float32]  # [H, W] in 0..1

FACE_AREA = 3.0  # masked width and height, in those of a face that was found


@dataclass(frozen=True)
class Place:
    """Which part of the portrait somebody moves.

    Attributes:
        box: of the masked area in pixels of the portrait; None where a picture says it or all of it is.
        face: the face that was found, as the preview shows it.
        mask: [H, W] of the size of the portrait, where a picture says it.
    """

    box: Box | None = None
    face: Box | None = None
    mask: Mask | None = None


def place_speakers(
    speakers: Sequence[Speaker],
    faces: Sequence[Box],
    size: tuple[int, int],
    masks: Sequence[Mask | None],
    area: float = FACE_AREA,
) -> tuple[list[Place], list[str]]:
    """Where everybody's face is.

    Args:
        speakers: in order.
        faces: that were found in the portrait, largest first or in any order.
        size: height and width of the portrait.
        masks: [H, W] of every speaker who has one as a picture.
        area: width and height of what a voice moves, in those of a face that was found.

    Returns:
        A place for each, and sentences about what may not be expected.

    Raises:
        UserError: more speakers than faces.
    """
    free = [face for face in faces if not any(_holds(s, m, face) for s, m in zip(speakers, masks, strict=True))]
    searching = [i for i, s in enumerate(speakers) if s.box is None and masks[i] is None]
    remarks: list[str] = []
    if len(searching) > len(free):
        if len(speakers) > 1:
            names = ", ".join(speakers[i].name for i in searching)
            found = f"{len(free)} face" + ("" if len(free) == 1 else "s")
            raise UserError(
                f"speakers: {found} found for {len(searching)} speakers without a box or a mask ({names}); say where "
                "they are, NAME=voice.wav@x0,y0,x1,y1."
            )
        remarks.append("no face was found; the voice moves the whole picture (a box or a mask says where the face is).")
    largest = sorted(free, key=_area, reverse=True)[: len(searching)]
    chosen = sorted(largest, key=lambda face: (face[0] + face[2], face[1] + face[3]))
    taken = dict(zip(searching, chosen, strict=False))
    if taken and len(free) > len(taken):
        others = len(free) - len(taken)
        found = f"{others} more face{' was' if others == 1 else 's were'} found than speakers"
        remarks.append(f"{found}; who has no voice stays silent.")
    places = []
    for i, (speaker, mask) in enumerate(zip(speakers, masks, strict=True)):
        if mask is not None or speaker.box is not None:
            places.append(Place(speaker.box, speaker.box, mask))
        elif i in taken:
            places.append(Place(enlarged(taken[i], faces, size, area), taken[i]))
        else:
            places.append(Place())
    return places, remarks


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _holds(speaker: Speaker, mask: Mask | None, face: Box) -> bool:
    """Is the middle of a face in the box or the mask that a speaker was given?"""
    x, y = (face[0] + face[2]) / 2, (face[1] + face[3]) / 2
    if speaker.box is not None:
        return speaker.box[0] <= x <= speaker.box[2] and speaker.box[1] <= y <= speaker.box[3]
    return mask is not None and bool(mask[min(int(y), mask.shape[0] - 1), min(int(x), mask.shape[1] - 1)] >= 0.5)


def enlarged(face: Box, faces: Sequence[Box], size: tuple[int, int], area: float = FACE_AREA) -> Box:
    """The masked area of a face: `area` times as wide and high, in the picture, halfway to the next face at most."""
    height, width = size
    x, y = (face[0] + face[2]) / 2, (face[1] + face[3]) / 2
    half = (face[2] - face[0]) * area / 2, (face[3] - face[1]) * area / 2
    left, right = max(0.0, x - half[0]), min(float(width), x + half[0])
    for other in faces:
        between = (other[0] + other[2]) / 2
        if other == face or abs(other[1] + other[3] - 2 * y) / 2 > half[1]:
            continue  # itself, or somebody above or below
        if between > x:
            right = min(right, max((face[2] + other[0]) / 2, face[2]))
        elif between < x:
            left = max(left, min((face[0] + other[2]) / 2, face[0]))
    return left, max(0.0, y - half[1]), right, min(float(height), y + half[1])


def draw_mask(place: Place, portrait: tuple[int, int], size: tuple[int, int]) -> Mask:
    """A place as a mask [H, W] of the video, into which the portrait is squeezed.

    Args:
        portrait, size: height and width of the portrait and of the video.
    """
    import cv2

    height, width = size
    if place.mask is not None:
        return cv2.resize(place.mask, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    mask = np.ones((height, width), np.float32)
    if place.box is not None:
        x0, y0, x1, y1 = scaled(place.box, portrait, size)
        mask[:] = 0
        mask[int(y0) : max(int(y1), int(y0) + 1), int(x0) : max(int(x1), int(x0) + 1)] = 1
    return mask


def scaled(box: Box, portrait: tuple[int, int], size: tuple[int, int]) -> Box:
    """A box of the portrait in pixels of the video."""
    down, right = size[0] / portrait[0], size[1] / portrait[1]
    return box[0] * right, box[1] * down, box[2] * right, box[3] * down
