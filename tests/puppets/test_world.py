# SPDX-License-Identifier: Apache-2.0
"""The drawn world keeps its promises: what is asked for is what stands in the frames."""

import numpy as np
import pytest

from talkingdit.puppets.probe import Identity, measure_height, measure_logo, measure_probe_error, probe
from talkingdit.puppets.render import mouth_boxes, render
from talkingdit.puppets.world import EXPRESSIONS, Character, Motion, Scene


def draw(scene, openings, size=96, seed=0):
    openings = np.atleast_2d(np.asarray(openings, np.float32))
    rng = np.random.default_rng(seed)
    motion = [Motion.random(rng, openings.shape[1]) for _ in scene.characters]
    return render(scene, openings, np.full_like(openings, 0.5), motion, size)


def test_probe_error_on_drawn_frames_is_as_stated_in_the_docs():
    error = measure_probe_error(scenes=12, frames=16)
    assert error["r"] > 0.99
    assert abs(error["slope"] - 1) < 0.03
    assert error["rms"] < 0.04
    assert error["identity"] == 1.0
    assert error["expression"] > 0.95


def test_blur_does_not_change_the_measured_opening():
    import cv2

    scene = Scene.random(np.random.default_rng(3))
    openings = np.linspace(0, 0.9, 10)
    frames = draw(scene, openings)
    blurred = np.stack([cv2.GaussianBlur(f, (0, 0), 1.5) for f in frames])
    np.testing.assert_allclose(measure_height(blurred), measure_height(frames), atol=0.012)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_is_told_from_the_others(expression):
    scene = Scene((Character.random(np.random.default_rng(5)),), (expression,))
    reading = probe(draw(scene, np.linspace(0, 0.8, 8)))
    assert reading.expression_share(0, expression) >= 0.75


def test_of_two_people_the_one_who_talks_is_found():
    rng = np.random.default_rng(7)
    scene = Scene.random(rng, people=2)
    openings = np.zeros((2, 32), np.float32)
    openings[1, :16] = rng.random(16)
    openings[0, 16:] = rng.random(16)
    reading = probe(draw(scene, openings), people=2)
    assert (reading.speaker[4:12] == 1).all()
    assert (reading.speaker[20:28] == 0).all()
    assert all(reading.identity_share(p, scene.characters[p]) > 0.9 for p in range(2))


def test_the_logo_is_told_from_the_others():
    for seed in range(6):
        scene = Scene.random(np.random.default_rng(seed))
        character = scene.characters[0]
        found = measure_logo(draw(scene, np.linspace(0, 1, 6, dtype=np.float32)[None]))
        assert found == [(character.logo, character.logo_colour)] * 6


def test_back_view_shows_no_face_and_side_views_mirror_each_other():
    scene = Scene((Character.random(np.random.default_rng(1)),))
    closed = np.zeros((1, 1), np.float32)
    view = {v: render(scene.with_viewpoint(v), closed, closed, [Motion.still(1)])[0] for v in ("back", "left", "right")}
    opened = render(scene.with_viewpoint("back"), closed + 1, closed, [Motion.still(1)])[0]
    assert (view["back"] == opened).all()
    left, right = view["left"].astype(int), view["right"].astype(int)
    assert np.abs(left - right[:, ::-1]).mean() < 0.25 * np.abs(left - right).mean()


def test_mouth_boxes_hold_every_pixel_that_talking_changes():
    rng = np.random.default_rng(2)
    scene = Scene.random(rng)
    motion = [Motion.still(1)]
    shut = render(scene, np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32), motion)[0]
    wide = render(scene, np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), motion)[0]
    rows, columns = np.nonzero(np.any(shut != wide, axis=-1))
    x0, y0, x1, y1 = mouth_boxes(scene, motion)[0, 0] * 96
    assert columns.min() >= x0 - 1
    assert columns.max() <= x1 + 1
    assert rows.min() >= y0 - 1
    assert rows.max() <= y1 + 1


def test_held_out_characters_are_never_drawn_for_training():
    rng = np.random.default_rng(11)
    train = {Identity.of(Character.random(rng, "train")) for _ in range(400)}
    held_out = {Identity.of(Character.random(rng, "held_out")) for _ in range(100)}
    assert not train & held_out


def test_frames_scale_with_the_size_asked_for():
    scene = Scene.random(np.random.default_rng(0))
    openings = np.array([[0.0, 0.5, 1.0]], np.float32)
    big = render(scene, openings, openings, [Motion.still(3)], 192)
    assert big.shape == (3, 192, 192, 3)
    got = measure_height(big)
    assert np.corrcoef(got, openings[0])[0, 1] > 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scene(()), "one, two or three people, got 0"),
        (lambda: Scene((Character.random(np.random.default_rng(0)),), ("bored",)), "expression must be one of neutral"),
        (lambda: Scene((Character.random(np.random.default_rng(0)),), ()), "one entry per character"),
        (
            lambda: render(
                Scene.random(np.random.default_rng(0)), np.zeros((2, 3), "f"), np.zeros((2, 3), "f"), [Motion.still(3)]
            ),
            r"must both be \[people=1, F\], got \(2, 3\)",
        ),
        (lambda: probe(np.zeros((2, 96, 64, 3), np.uint8)), "square uint8 RGB"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
