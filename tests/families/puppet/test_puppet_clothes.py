# SPDX-License-Identifier: Apache-2.0
"""The clothes of the portrait stay on, as the probe sees them, whatever became of them in the generated frames."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from talkingdit.autoencoders.streaming import to_frames, to_video
from talkingdit.families.puppet.clothes import keep_clothes
from talkingdit.puppets.probe import measure_logo
from talkingdit.puppets.render import render
from talkingdit.puppets.world import LOGO_COLOUR, LOGOS, Character, Motion, Scene

FRAMES = 24


def drawn(logo: str, colour: str, motion: Motion, background: str = "sky") -> np.ndarray:
    scene = Scene((Character("tan", "short", "black", "blue", logo, colour, "green"),), background=background)
    opening = np.linspace(0, 1, len(motion.dx), dtype=np.float32)[None]
    return render(scene, opening, np.full_like(opening, 0.5), [motion])


@pytest.fixture(scope="module")
def motion() -> Motion:
    return Motion.random(np.random.default_rng(3), FRAMES, fps=4, sway=0.04)


def worn_out(frames: np.ndarray, blob: tuple[int, int, int] = (221, 198, 104)) -> np.ndarray:
    """What a weak model makes of frames: blurred, and the logo a blob of another colour, gold."""
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.5) for frame in frames])
    for frame in blurred:
        cv2.circle(frame, (48, 86), 5, blob, -1, cv2.LINE_AA)
    return blurred


@pytest.mark.parametrize("logo", LOGOS)
def test_a_logo_keeps_its_shape_and_colour(logo: str, motion: Motion) -> None:
    for colour in LOGO_COLOUR:
        blob = (230, 230, 230) if colour == "yellow" else (221, 198, 104)
        frames = worn_out(drawn(logo, colour, motion), blob)
        portrait = to_video(drawn(logo, colour, Motion.still(1)))
        kept = to_frames(keep_clothes(portrait)(to_video(frames)))
        right = np.mean([found == (logo, colour) for found in measure_logo(kept)])
        lost = np.mean([found == (logo, colour) for found in measure_logo(frames)])
        assert right == 1.0
        assert lost < 0.5
        np.testing.assert_array_equal(kept[:, :74], frames[:, :74])  # the face


def test_clothes_follow_the_shoulders(motion: Motion) -> None:
    truth = drawn("star", "white", motion)
    kept = to_frames(keep_clothes(to_video(drawn("star", "white", Motion.still(1))))(to_video(worn_out(truth))))
    where = np.s_[:, 82:94, 42:54]
    error = np.abs(kept[where].astype(float) - truth[where]).mean()
    fixed = np.abs(drawn("star", "white", Motion.still(FRAMES))[where].astype(float) - truth[where]).mean()
    assert error < 0.6 * fixed  # what is left is the softness of half a pixel


def test_a_video_may_be_cut_anywhere_and_someone_else_keeps_their_clothes(motion: Motion) -> None:
    frames = to_video(worn_out(drawn("star", "white", motion)))
    keep = keep_clothes(to_video(drawn("star", "white", Motion.still(1))))
    torch.testing.assert_close(torch.cat([keep(frames[:, :, :7]), keep(frames[:, :, 7:])], 2), keep(frames))
    noise = torch.rand(1, 3, 5, 96, 96) * 2 - 1
    assert torch.equal(keep(noise), noise)
