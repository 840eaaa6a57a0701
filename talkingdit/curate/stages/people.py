# SPDX-License-Identifier: Apache-2.0
"""Who is to be seen: faces, followed through the clip, and the points of each.

Faces are searched several times a second by a quick detector of large ones and, in the stills, by a thorough one that
finds small ones too. What lies between is filled in, and there the mesh says whether it is a face.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import ClipFindings, Figures, Person
from talkingdit.detect import blaze, faces, mesh, tflite
from talkingdit.detect.boxes import overlap
from talkingdit.detect.faces import Face
from talkingdit.detect.packages import NotInstalledError

LIKE = 0.25  # overlap of boxes, as a share of both together, of one person's face in two pictures
PRESENT = 0.3  # share of pictures in which somebody is who counts
MOST = 4  # people whose mouths are followed
LEFT_CHEEK, RIGHT_CHEEK = 234, 454  # points of the mesh, as they lie in the picture
LIPS = (61, 291, 0, 17, 37, 267, 84, 314)  # outer points


@dataclass
class _Track:
    """Faces of one person: picture, face."""

    seen: list[tuple[int, Face]] = field(default_factory=list)
    searched: set[int] = field(default_factory=set)


class PeopleStage:
    """People, the share of pictures with a face, and how large and how turned the largest one is."""

    gpu = False

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        if not (blaze.available() and mesh.available()):
            raise NotInstalledError(f"people: the weights of the face mesh are not installed, {tflite.GET}.")
        self._thorough = faces.available()

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        count = len(look.pictures)
        quick = sorted({*range(0, count, max(1, round(self._watch.face_every * look.fps))), count - 1})
        found_in = {index: blaze.large_faces(look.pictures[index]) for index in quick}
        with_face = [bool(found_in[index]) for index in quick]
        most = max((len(one) for one in found_in.values()), default=0)
        thorough: list[int] = []
        if self._thorough:
            for still in look.stills:
                scale = still.picture.shape[1] / look.pictures.shape[2]
                here = [_scaled(face, 1 / scale) for face in faces.faces(still.picture, 0.6, 640)]
                thorough.append(len(here))
                if still.index not in found_in:
                    found_in[still.index] = blaze.large_faces(look.pictures[still.index])
                known = found_in[still.index]
                known += [face for face in here if all(overlap(face.box, other.box) < LIKE for other in known)]
                most = max(most, len(known))
        tracks = _linked(found_in)
        stills = {still.index for still in look.stills}
        people = [_person(track, count, _share(track, len(quick), stills)) for track in tracks]
        people = [person for person in people if person.presence >= PRESENT]
        people.sort(key=lambda person: -_area(person.boxes) * person.presence)
        for person in people[:MOST]:
            _follow(person, look.pictures)
        found.people = people
        share = max(float(np.mean(with_face)), float(np.mean([n > 0 for n in thorough])) if thorough else 0.0)
        figures: Figures = {"faces.people": len(people), "faces.most": most, "faces.share": round(share, 4)}
        if people:
            figures |= _of_largest(people[0], look)
        return figures


def _of_largest(person: Person, look: Look) -> Figures:
    height, width = look.pictures.shape[1:3]
    boxes = person.boxes / np.array([width, height, width, height], np.float32)
    moves = np.abs(np.diff((boxes[:, :2] + boxes[:, 2:]) / 2, axis=0)).sum(1) if len(boxes) > 1 else np.zeros(1)
    figures: Figures = {
        "faces.height": round(float(np.median(boxes[:, 3] - boxes[:, 1])), 4),
        "faces.pixels": round(float(np.median(person.boxes[:, 3] - person.boxes[:, 1])) * look.scale, 1),
        "faces.box": _around(person.boxes, width, height),
        "faces.travel": round(float(moves.sum() / look.seconds), 4),
    }
    if person.yaw is not None and person.likely is not None and person.mouth is not None:
        figures["faces.mouth"] = _around(person.mouth, width, height)
        figures["faces.yaw"] = round(float(np.median(person.yaw)), 1)
        figures["faces.likely"] = round(float(np.mean(person.likely)), 3)
    return figures


def _around(boxes: NDArray[np.float32], width: int, height: int) -> list[float]:
    """The box around boxes [F, 4], in parts of the picture."""
    sides = [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)]
    return [round(float(np.clip(s / full, 0, 1)), 4) for s, full in zip(sides, (width, height) * 2, strict=True)]


def _follow(person: Person, pictures: NDArray[np.uint8]) -> None:
    """The mouth, the head's turn and the likeliness of a face in every picture."""
    opening, yaw, likely = (np.zeros(len(pictures), np.float32) for _ in range(3))
    mouth = np.zeros((len(pictures), 4), np.float32)
    for i, picture in enumerate(pictures):
        x0, y0, x1, y1 = (float(side) for side in person.boxes[i])
        angle = float(person.roll[i])
        eyes = ((0.0, 0.0), (float(np.cos(angle)), float(np.sin(angle))))
        found = mesh.mesh(picture, Face(x0, y0, x1, y1, 1.0, eyes))
        across = found.points[RIGHT_CHEEK] - found.points[LEFT_CHEEK]
        opening[i], likely[i] = found.opening, found.score
        yaw[i] = np.degrees(np.arctan2(across[2], across[0]))
        lips = found.points[list(LIPS), :2]
        mouth[i] = [*lips.min(0), *lips.max(0)]
    person.opening, person.yaw, person.likely, person.mouth = opening, yaw, likely, mouth


def _linked(found_in: dict[int, list[Face]]) -> list[_Track]:
    """Faces of different pictures that lie on each other belong to one person."""
    tracks: list[_Track] = []
    for index in sorted(found_in):
        free = list(tracks)
        for face in found_in[index]:
            best = max(free, key=lambda track: overlap(track.seen[-1][1].box, face.box), default=None)
            if best is not None and overlap(best.seen[-1][1].box, face.box) >= LIKE:
                best.seen.append((index, face))
                free.remove(best)
            else:
                tracks.append(_Track([(index, face)]))
    return tracks


def _share(track: _Track, searched: int, stills: set[int]) -> float:
    """In how many of the pictures in which it could have been found a face was: small ones only in stills."""
    seen = {index for index, _ in track.seen}
    return len(seen) / max(1, len(stills) if seen <= stills else searched)


def _person(track: _Track, count: int, presence: float) -> Person:
    """Boxes in all pictures of a clip, from those in which the face was found."""
    at = [index for index, _ in track.seen]
    sides = np.array([face.box for _, face in track.seen], np.float32)
    rolls = np.array([_roll(face) for _, face in track.seen], np.float32)
    every = np.arange(count)
    boxes = np.stack([np.interp(every, at, sides[:, side]) for side in range(4)], 1).astype(np.float32)
    return Person(boxes, presence, np.interp(every, at, rolls).astype(np.float32))


def _roll(face: Face) -> float:
    if len(face.landmarks) < 2:
        return 0.0
    (lx, ly), (rx, ry) = face.landmarks[:2]
    return float(np.arctan2(ry - ly, rx - lx))


def _scaled(face: Face, ratio: float) -> Face:
    points = tuple((x * ratio, y * ratio) for x, y in face.landmarks)
    return Face(face.x0 * ratio, face.y0 * ratio, face.x1 * ratio, face.y1 * ratio, face.score, points)


def _area(boxes: NDArray[np.float32]) -> float:
    return float(np.mean((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])))
