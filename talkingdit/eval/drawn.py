# SPDX-License-Identifier: Apache-2.0
"""Eyes for the drawn world, whose people no face detector knows: its probe finds faces, mouths and expressions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from talkingdit.errors import UserError
from talkingdit.eval.clip import EvalClip, Frames
from talkingdit.eval.found import Found
from talkingdit.eval.slots import Backbone
from talkingdit.eval.tracks import Track

FloatArray = npt.NDArray[np.float64]

GRID = 8  # cells of a side in which colours are averaged


class DrawnIdentity:
    """Colours of a crop's 8 x 8 cells, without their mean: [n, 192]. In the drawn world colours are who somebody is."""

    def __call__(self, crops: Frames) -> FloatArray:
        import cv2

        cells = np.stack([cv2.resize(crop, (GRID, GRID), interpolation=cv2.INTER_AREA) for crop in crops])
        flat = cells.reshape(len(crops), -1).astype(np.float64)
        centred: FloatArray = flat - 127.5
        return centred


class DrawnFinder:
    """One person in a square frame, as `puppets.render` draws them from the front."""

    name, version = "drawn-probe", 1
    backbones: Mapping[str, Backbone] = {
        "identity": Backbone("identity", "drawn-colours", "1", "Apache-2.0", DrawnIdentity)
    }

    def missing(self) -> dict[str, str]:
        return dict.fromkeys(("hands", "left_hand", "right_hand", "body"), "the drawn world has no hands and no bodies")

    def __call__(self, clip: EvalClip, regions: frozenset[str]) -> Found:
        """Raises UserError: frames that are not square."""
        if "face" not in regions:
            return Found({})
        from talkingdit.puppets.probe import probe
        from talkingdit.puppets.render import FACES, HEAD, HEAD_RADII

        height, width = clip.frames.shape[1:3]
        if height != width or height < 32:
            raise UserError(
                f"video {clip.name!r}: the drawn world has square frames of at least 32 pixels, got {width}x{height}."
            )
        reading = probe(clip.frames, fps=max(1, round(clip.fps)))
        corners = [HEAD[0] - HEAD_RADII[0], HEAD[1] - HEAD_RADII[1], HEAD[0] + HEAD_RADII[0], HEAD[1] + HEAD_RADII[1]]
        n = len(clip.frames)
        track = Track(np.tile(np.array(corners) * width, (n, 1)), np.ones(n), np.zeros(n, np.int64))
        moods = np.array([dataclasses.astuple(FACES[mood]) for mood in reading.expression[0]])
        return Found({"face": (track,)}, (reading.opening[0].astype(np.float64),), (moods,), people=1)
