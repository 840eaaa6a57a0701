# SPDX-License-Identifier: Apache-2.0
"""A drift of colour is taken back; motion and content stay."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from talkingdit.media.colour import ColourUnifier, colours, match_colours


def scene(shift: int = 0) -> Tensor:
    """[1, 3, 4, 32, 32]: smooth coloured blobs."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    planes = [torch.sin((x + shift) / (5 + c)) * torch.cos((y - shift) / (7 + c)) * 0.4 - 0.1 * c for c in range(3)]
    return torch.stack(planes)[None, :, None].repeat(1, 1, 4, 1, 1)


def test_a_drift_of_brightness_contrast_and_tint_is_taken_back() -> None:
    plain = scene()
    drifted = (plain * 1.1 + torch.tensor([0.12, 0.02, -0.06]).view(1, 3, 1, 1, 1)).clamp(-1, 1)
    restored = match_colours(drifted, colours(plain))
    before, after = (drifted - plain).abs().mean(), (restored - plain).abs().mean()
    assert after < 0.25 * before
    torch.testing.assert_close(colours(restored), colours(plain), rtol=0.02, atol=0.2)


def test_a_clip_with_the_right_colours_stays_as_it_is() -> None:
    video = scene()
    torch.testing.assert_close(match_colours(video, colours(video)), video, rtol=0, atol=1e-4)


def test_motion_stays() -> None:
    first, moved = scene(), scene(shift=3)
    matched = match_colours(moved, colours(first))
    assert (matched - moved).abs().mean() < 0.2 * (matched - first).abs().mean()


def test_another_content_changes_contrast_by_a_quarter_at_most() -> None:
    video = scene()
    flat = video * 0.1
    matched = match_colours(flat, colours(video))
    assert (colours(matched)[1] < 1.26 * colours(flat)[1]).all()


def test_lab_is_that_of_opencv() -> None:
    video = scene()
    rgb = ((video[0, :, 0] + 1) / 2).permute(1, 2, 0).numpy()
    lab = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2LAB).reshape(-1, 3)
    found = colours(video[:, :, :1]).numpy()
    np.testing.assert_allclose(found, np.stack([lab.mean(0), lab.std(0)]), atol=0.15)


def test_grey_pictures_do_not_become_coloured() -> None:
    grey = scene()[:, :1].repeat(1, 3, 1, 1, 1)
    matched = match_colours(grey * 0.8, colours(grey))
    assert (matched[:, 0] - matched[:, 2]).abs().max() < 0.02


def test_a_video_that_darkens_part_by_part_keeps_its_colours_without_steps() -> None:
    plain = scene().repeat(1, 1, 10, 1, 1)
    drift = torch.linspace(0, 0.3, 40).view(1, 1, 40, 1, 1)
    unify = ColourUnifier()
    parts = [unify(part) for part in (plain - drift).clamp(-1, 1).split(4, dim=2)]
    video = torch.cat(parts, dim=2)
    brightness, before = video.mean((0, 1, 3, 4)), (plain - drift).mean((0, 1, 3, 4))
    assert (brightness - brightness[0]).abs().max() < 0.25 * (before - before[0]).abs().max()
    # Borders of parts are no larger steps than those inside.
    steps = brightness.diff().abs()
    borders = steps[3::4]
    assert borders.max() <= 1.1 * max(float(steps.max()), 1e-6)
    assert borders.mean() < 2 * steps.mean() + 1e-3


def test_colours_that_do_not_drift_are_left_alone_and_the_reference_may_be_given() -> None:
    video = scene()
    unify = ColourUnifier()
    for _ in range(2):
        torch.testing.assert_close(unify(video), video, rtol=0, atol=1e-4)
    darker = ColourUnifier(wanted=colours(video))((video - 0.2).clamp(-1, 1))
    assert (darker - video).abs().mean() < 0.05
    torch.testing.assert_close(ColourUnifier(colours(video), 0.0)(video - 0.2), video - 0.2, rtol=0, atol=1e-3)
