# SPDX-License-Identifier: Apache-2.0
"""What is found in a video, and what a finder is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from talkingdit.eval.clip import EvalClip
from talkingdit.eval.tracks import Track

FloatArray = npt.NDArray[np.float64]
REGIONS = ("whole", "body", "face", "hands", "left_hand", "right_hand")


@dataclass(frozen=True)
class Found:
    """What a finder saw in a video of F frames.

    Attributes:
        tracks: by region; "whole" is not among them. Every person has a track of their own.
        openings: [F] of each face's mouth, 0 closed; NaN in frames without it.
        expressions: [F, d] of each face: numbers that change with the expression and not with the person's place.
        hand_scores: [F], mean score of the hands that were found; NaN without a hand.
        hand_points: [F, 42, 2] points of the left and the right hand over the frame's height; NaN likewise.
        people: the median count of faces over the frames that have one, 0 without any.
    """

    tracks: dict[str, tuple[Track, ...]]
    openings: tuple[FloatArray, ...] = ()
    expressions: tuple[FloatArray, ...] = ()
    hand_scores: FloatArray = field(default_factory=lambda: np.zeros(0))
    hand_points: FloatArray = field(default_factory=lambda: np.zeros((0, 42, 2)))
    people: int = 0


class Finder(Protocol):
    """Looks for people. `name` and `version` stand in the results and in the keys of the cache.

    `backbones` are networks that go with it, by slot, in place of those that packages bring.
    """

    name: str
    version: int
    backbones: Mapping[str, Any]

    def missing(self) -> dict[str, str]:
        """Regions that it cannot find here, each with the one line that says what to give."""

    def __call__(self, clip: EvalClip, regions: frozenset[str]) -> Found:
        """Look at every frame of a clip for what these regions need."""
