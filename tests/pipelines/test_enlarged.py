# SPDX-License-Identifier: Apache-2.0
"""Enlarged frames are no larger than H.264 knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from talkingdit.errors import UserError
from talkingdit.pipelines.inputs import Job, Outline, check_enlarged


def test_enlarged_frames_have_a_bound() -> None:
    outline = Outline(size=(704, 1024), fps=16, clips=1, steps=1, predictions=1, frames=1)
    job = {"image": Path("a.png"), "audio": Path("a.wav"), "output": Path("a.mp4")}
    check_enlarged(Job(**job, upscale=7), outline)
    with pytest.raises(UserError, match="upscale: must be 1 to 7 for frames of 1024 x 704"):
        check_enlarged(Job(**job, upscale=8), outline)
