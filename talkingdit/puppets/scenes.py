# SPDX-License-Identifier: Apache-2.0
"""Scenes of several people, each with a voice or silent, whose expressions may change: drawn, and measured back.

What a model is asked: everybody's mouth follows their own voice and nobody else's, who has no voice keeps the mouth
still, and faces show what they are told to, when they are told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from talkingdit.puppets.measure import correlation
from talkingdit.puppets.probe import probe
from talkingdit.puppets.render import HEAD, HEAD_RADII, Image, render
from talkingdit.puppets.world import PLACEMENTS, FloatArray, Motion, Scene

FACE_MARGIN = 0.03  # of the box of a face around the head
STILL_SECONDS = 0.5  # over which it is decided who moves


@dataclass(frozen=True)
class Play:
    """What happens in a scene.

    Attributes:
        scene: who is in it; its expressions are those of the first frame.
        openings, widths: of the mouths, [people, F].
        motion: of everybody, F frames each.
        moods: the expression of everybody in every frame, [F]; None keeps those of the scene.
    """

    scene: Scene
    openings: FloatArray
    widths: FloatArray
    motion: Sequence[Motion]
    moods: Sequence[str] | None = None

    def draw(self, size: int) -> Image:
        """Frames [F, size, size, 3]."""
        if self.moods is None:
            return render(self.scene, self.openings, self.widths, self.motion, size)
        parts, frames = [], self.openings.shape[1]
        ends = [i for i in range(1, frames) if self.moods[i] != self.moods[i - 1]]
        for first, last in zip([0, *ends], [*ends, frames], strict=True):
            scene = replace(self.scene, expressions=(self.moods[first],) * len(self.scene.characters))
            span = slice(first, last)
            motion = [Motion(m.dx[span], m.dy[span], m.eyelids[span], m.phase[span]) for m in self.motion]
            parts.append(render(scene, self.openings[:, span], self.widths[:, span], motion, size))
        return np.concatenate(parts)


def portrait_of(scene: Scene, size: int) -> Image:
    """A scene with all mouths closed and nobody moving: [size, size, 3]."""
    people = len(scene.characters)
    shut = np.zeros((people, 1), np.float32)
    return render(scene, shut, shut + 0.5, [Motion.still(1)] * people, size)[0]


def face_boxes(people: int) -> list[tuple[float, float, float, float]]:
    """The box of everybody's face where people stand still, x0, y0, x1, y1 in frame sizes, left to right."""
    half = HEAD_RADII[0] + FACE_MARGIN, HEAD_RADII[1] + FACE_MARGIN
    boxes = []
    for x, y, scale in PLACEMENTS[people]:
        cx, cy = x + (HEAD[0] - 0.5) * scale, y + HEAD[1] * scale
        box = (cx - half[0] * scale, cy - half[1] * scale, cx + half[0] * scale, cy + half[1] * scale)
        boxes.append((max(0.0, box[0]), max(0.0, box[1]), min(1.0, box[2]), min(1.0, box[3])))
    return boxes


def plain_caption(scene: Scene) -> str:
    """A scene in words that say nothing of moods."""
    people = " and ".join(character.caption() for character in scene.characters)
    return f"{people}, {scene.viewpoint} view, talking"


# ---- Measures --------------------------------------------------------------------------------------------------------
def measure_mouths(frames: Image, truth: FloatArray, fps: int) -> dict[str, Any]:
    """Whether every mouth follows its own voice.

    Args:
        frames: [F, S, S, 3].
        truth: [people, F], how far the voice of each would open the mouth; zeros of who is silent.

    Returns:
        own: correlation of each talker's mouth with the own voice; others: the largest absolute one with another's;
        silent: how much each silent person's mouth moves (standard deviation) in shares of the talkers' mean.
    """
    opening = probe(frames, len(truth), fps).opening
    talks = truth.std(1) > 1e-6
    own = [correlation(truth[i], opening[i]) for i in np.flatnonzero(talks)]
    others = [
        max((abs(correlation(truth[j], opening[i])) for j in np.flatnonzero(talks) if j != i), default=0.0)
        for i in np.flatnonzero(talks)
    ]
    level = float(np.mean([opening[i].std() for i in np.flatnonzero(talks)])) if talks.any() else 0.0
    silent = [float(opening[i].std() / max(level, 1e-6)) for i in np.flatnonzero(~talks)]
    return {"own": own, "others": others, "silent": silent}


def measure_turns(frames: Image, speaking: Sequence[int], fps: int) -> float:
    """Share of the frames in which the one who speaks moves most, away from changes by half of `STILL_SECONDS`.

    Args:
        speaking: who speaks in every frame, -1 for nobody.
    """
    who = np.asarray(speaking)
    found = probe(frames, int(who.max()) + 1 if who.max() > 0 else 2, fps).speaker
    reach = max(1, int(fps * STILL_SECONDS / 2))
    steady = np.array([len(set(who[max(0, i - reach) : i + reach + 1].tolist())) == 1 for i in range(len(who))])
    judged = steady & (who >= 0)
    return float((found[judged] == who[judged]).mean()) if judged.any() else float("nan")


def measure_moods(frames: Image, moods: Sequence[str], people: int, fps: int) -> dict[str, float]:
    """Whether faces show what they are told to.

    Returns:
        follows: share of frames with the right expression, over all people; delay: seconds from a change of what is
        told to the first frame that shows it, the longest one (nan without changes or where one is never shown).
    """
    reading = probe(frames, people, fps)
    shown = np.array(reading.expression)  # [people, F]
    told = np.array(moods)
    delays = []
    for at in np.flatnonzero(told[1:] != told[:-1]) + 1:
        for row in shown:
            right = np.flatnonzero(row[at:] == told[at])
            delays.append(float(right[0]) / fps if len(right) else float("nan"))
    return {
        "follows": float((shown == told[None]).mean()),
        "delay": float(np.max(delays)) if delays else float("nan"),
    }


def measure_motion(frames: Image, scene: Scene, fps: int) -> dict[str, float]:
    """How much a video moves, and whether people stay who they are: the two sides of character injection (Table 3).

    Returns:
        motion: mean absolute difference of neighbouring frames, of 255; identity: share of frames, over all people.
    """
    reading = probe(frames, len(scene.characters), fps)
    shares = [reading.identity_share(i, character) for i, character in enumerate(scene.characters)]
    moved = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean()
    return {"motion": float(moved), "identity": float(np.mean(shares))}


def measure_seams(frames: Image, borders: Sequence[int], others: Sequence[int] | None = None) -> float:
    """Mean difference of the frames on both sides of a border, over that of other neighbours; 1 is no seam.

    Args:
        borders: first frames behind a border.
        others: second frames of the neighbours to compare with, borders among them are left out; None: all frames.
    """
    steps = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean((1, 2, 3))  # step i: frame i to i + 1
    at, compared = np.zeros(len(steps), bool), np.full(len(steps), others is None)
    at[[b - 1 for b in borders if 0 < b <= len(steps)]] = True
    compared[[b - 1 for b in others or () if 0 < b <= len(steps)]] = True
    compared &= ~at
    if not at.any() or not compared.any():
        return float("nan")
    return float(steps[at].mean() / max(float(steps[compared].mean()), 1e-9))
