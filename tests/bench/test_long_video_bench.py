# SPDX-License-Identifier: Apache-2.0
"""The bench of long videos compares steps that give the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from bench import long_video
from talkingdit.media.files import VideoWriter
from talkingdit.puppets.render import render
from talkingdit.puppets.world import Character, Motion, Scene


def test_the_loops_are_those_of_the_plans_and_move_more() -> None:
    rows = long_video.run(long_video.QUICK, 2, quick=True)["steps"]
    assert [row["scheme"] for row in rows] == ["stable_avatar", "hunyuan_avatar"]
    for row in rows:
        assert row["relative_difference"] < 1e-6
        assert row["loop_mb"] > 2 * row["fused_mb"]
        assert row["weights_bytes"] == 8 * row["windows"] * 5  # a number per frame of a window, none per element


def test_what_a_video_loses_on_its_way_is_seen(tmp_path: Path) -> None:
    """Logo and background change behind the first second; the person stays."""
    who = Character("pale", "bun", "red", "black", "star", "white", "brown")
    before = Scene((who,), background="sky")
    after = Scene((replace(who, logo_colour="yellow"),), background="mint")
    still, shut = Motion.still(16), np.zeros((1, 16), np.float32)
    portrait = tmp_path / "portrait.png"
    parts = [render(scene, shut, shut + 0.5, [still], 96) for scene in (before, before, after)]
    Image.fromarray(parts[0][0]).save(portrait)
    with VideoWriter(tmp_path / "out.mp4", fps=16, size=(96, 96)) as writer:
        for part in parts:
            writer.write(part)
    first, last = long_video.ends(tmp_path / "out.mp4", portrait, seconds=1.0)
    assert (first["identity"], first["logo"], last["identity"], last["logo"]) == (1.0, 1.0, 1.0, 0.0)
    assert first["background"] > 0.99 > last["background"]


def test_a_long_video_is_made_and_read(tmp_path: Path) -> None:
    """As `--minutes` does: rows stay, and are not made again."""
    path = tmp_path / "rows.json"
    (row,) = long_video.videos([0.03], 1, path)["videos"]
    assert row["frames"] == 29
    assert row["peak_mib"] > 100
    assert set(row["first"]) == set(row["last"]) == {"identity", "logo", "background"}
    assert long_video.videos([0.03], 1, path)["videos"] == [row]
