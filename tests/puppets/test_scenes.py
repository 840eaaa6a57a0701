# SPDX-License-Identifier: Apache-2.0
"""Drawn scenes of several people are measured for what they are."""

from __future__ import annotations

import numpy as np
import pytest

from talkingdit.puppets.probe import probe
from talkingdit.puppets.render import MOUTH_INTERIOR
from talkingdit.puppets.scenes import (
    Play,
    face_boxes,
    measure_moods,
    measure_motion,
    measure_mouths,
    measure_seams,
    measure_turns,
    plain_caption,
    portrait_of,
)
from talkingdit.puppets.world import Motion, Scene

SIZE, FPS, FRAMES = 128, 16, 48


def smooth(rng: np.random.Generator, frames: int) -> np.ndarray:
    """An opening that goes up and down, unlike any other."""
    t = np.arange(frames) / FPS
    wave = sum(np.sin(2 * np.pi * rng.uniform(1, 3) * t + rng.uniform(0, 6)) for _ in range(3))
    return np.clip(0.5 + 0.25 * wave, 0, 1).astype(np.float32)


def play(people: int, silent: int | None = None, moods: list[str] | None = None, seed: int = 0) -> Play:
    rng = np.random.default_rng(seed)
    scene = Scene.random(rng, "held_out", people)
    openings = np.stack([smooth(rng, FRAMES) for _ in range(people)])
    if silent is not None:
        openings[silent] = 0
    motion = [Motion.random(rng, FRAMES, FPS, sway=0.005) for _ in range(people)]
    return Play(scene, openings, np.full_like(openings, 0.5), motion, moods)


@pytest.mark.parametrize("people", [2, 3])
def test_every_mouth_is_measured_by_itself(people: int) -> None:
    drawn = play(people, silent=people - 1)
    found = measure_mouths(drawn.draw(SIZE), drawn.openings, FPS)
    assert len(found["own"]) == people - 1
    assert min(found["own"]) > 0.95
    assert len(found["silent"]) == 1
    assert found["silent"][0] < 0.1
    swapped = measure_mouths(drawn.draw(SIZE), drawn.openings[[*range(1, people - 1), 0, people - 1]], FPS)
    if people == 3:
        assert max(swapped["own"]) < 0.6
        assert min(swapped["others"]) > 0.95


def test_boxes_hold_the_mouths() -> None:
    for people in (1, 2, 3):
        drawn = play(people)
        wide = Play(drawn.scene, np.ones((people, 1), np.float32), np.ones((people, 1), np.float32),
                    [Motion.still(1)] * people).draw(SIZE)[0]  # fmt: skip
        dark = np.abs(wide.astype(int) - MOUTH_INTERIOR).sum(-1) < 30
        boxes = face_boxes(people)
        inside = np.zeros_like(dark)
        for x0, y0, x1, y1 in boxes:
            part = np.s_[int(y0 * SIZE) : int(y1 * SIZE), int(x0 * SIZE) : int(x1 * SIZE)]
            assert dark[part].any()
            inside[part] = True
        assert not (dark & ~inside).any()
        assert [box[0] for box in boxes] == sorted(box[0] for box in boxes)


def test_no_face_of_three_hides_another_or_is_smaller_than_one_of_two() -> None:
    """A voice belongs to a mask, and what an autoencoder keeps of a mouth depends on its pixels."""

    def width(box: tuple[float, float, float, float]) -> float:
        return box[2] - box[0]

    boxes = face_boxes(3)
    assert min(map(width, boxes)) >= 0.99 * min(map(width, face_boxes(2)))
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            apart = max(one[0], other[0]) - min(one[2], other[2])
            above = max(one[1], other[1]) - min(one[3], other[3])
            assert max(apart, above) >= 0


def test_who_stands_behind_is_recognised() -> None:
    """The heads in front hide the shoulders of the second of three, whose shirt the probe reads between them."""
    drawn = play(3)
    reading = probe(drawn.draw(SIZE), 3, FPS)
    for i, who in enumerate(drawn.scene.characters):
        assert reading.identity_share(i, who) == 1


def test_who_moves_is_who_speaks() -> None:
    drawn = play(2)
    speaking = [0] * 24 + [1] * 24
    openings = drawn.openings.copy()
    openings[0, 24:] = openings[1, :24] = 0
    frames = Play(drawn.scene, openings, drawn.widths, drawn.motion).draw(SIZE)
    assert measure_turns(frames, speaking, FPS) > 0.95
    assert measure_turns(frames, speaking[::-1], FPS) < 0.05


def test_moods_are_seen_when_they_change() -> None:
    moods = ["happy"] * 20 + ["surprised"] * 28
    frames = play(2, moods=moods).draw(SIZE)
    found = measure_moods(frames, moods, 2, FPS)
    assert found["follows"] > 0.9
    assert found["delay"] <= 0.25
    late = measure_moods(frames, ["happy"] * 10 + ["surprised"] * 38, 2, FPS)
    assert late["delay"] == pytest.approx(10 / FPS, abs=0.26)
    assert late["follows"] < found["follows"]


def test_motion_and_identity() -> None:
    drawn = play(2)
    frames = drawn.draw(SIZE)
    still = np.repeat(portrait_of(drawn.scene, SIZE)[None], FRAMES, 0)
    assert measure_motion(still, drawn.scene, FPS)["motion"] == 0
    assert measure_motion(frames, drawn.scene, FPS)["motion"] > 0.1
    assert measure_motion(frames, drawn.scene, FPS)["identity"] > 0.9
    other = Scene.random(np.random.default_rng(9), "held_out", 2)
    assert measure_motion(frames, other, FPS)["identity"] < 0.5
    assert not any(mood in plain_caption(drawn.scene) for mood in ("happy", "sad", "angry", "neutral", "contempt"))


def test_seams_stand_out() -> None:
    frames = np.zeros((12, 8, 8, 3), np.uint8)
    frames += np.arange(12, dtype=np.uint8)[:, None, None, None]
    assert measure_seams(frames, [4, 8]) == pytest.approx(1)
    frames[8:] += 3
    assert measure_seams(frames, [8]) == pytest.approx(4)
    assert np.isnan(measure_seams(frames, []))
    frames[4:] += 1
    assert measure_seams(frames, [8], [4, 8]) == pytest.approx(2)
    assert np.isnan(measure_seams(frames, [8], [8]))
