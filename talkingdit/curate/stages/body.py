# SPDX-License-Identifier: Apache-2.0
"""The body: how large the head is beside it, where hands are, and which way it faces."""

from __future__ import annotations

import numpy as np

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import ClipFindings, Figures
from talkingdit.detect import bodies, hands, pose, tflite
from talkingdit.detect.packages import NotInstalledError

SURE = 0.5  # score from which on a pose is one


class BodyStage:
    """Share of the head in the person, hands, and the angle between the body and the camera, in the stills."""

    gpu = False

    def __init__(self, watch: Watch) -> None:
        if not (bodies.available() and hands.available() and pose.available()):
            raise NotInstalledError(f"body: the weights of bodies and hands are not installed, {tflite.GET}.")

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        shares: list[float] = []
        figures: Figures = {"body.stills": len(look.stills)}
        person = found.people[0] if found.people else None
        tracked = 0
        for number, still in enumerate(look.stills):
            box = bodies.body(still.picture)
            if box is not None and person is not None:
                scale = still.picture.shape[0] / look.pictures.shape[1]
                _, top, _, bottom = person.boxes[still.index] * scale
                shares.append(float((bottom - top) / max(1.0, max(box[3], bottom) - min(box[1], top))))
            if box is not None:
                found.bodies[number] = box
                stands = pose.pose(still.picture, box)
                if stands.score >= SURE and stands.visible[list(pose.SHOULDERS)].min() >= SURE:
                    found.facing[number] = stands.facing
                    tracked += 1
            found.hands += [(number, *hand.box) for hand in hands.hands(still.picture)]
        with_hands = {number for number, *_ in found.hands}
        if shares:
            figures["body.head_share"] = round(float(np.median(shares)), 4)
        figures["body.pose_share"] = round(tracked / max(1, len(look.stills)), 4)
        figures["body.hands_share"] = round(len(with_hands) / max(1, len(look.stills)), 4)
        if found.facing:
            figures["body.facing"] = {str(look.stills[n].index): round(a, 1) for n, a in found.facing.items()}
        return figures
