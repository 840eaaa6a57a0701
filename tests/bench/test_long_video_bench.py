# SPDX-License-Identifier: Apache-2.0
"""The bench of long videos compares steps that give the same."""

from __future__ import annotations

from bench import long_video


def test_the_loops_are_those_of_the_plans_and_move_more() -> None:
    rows = long_video.run(long_video.QUICK, 2, quick=True)["steps"]
    assert [row["scheme"] for row in rows] == ["stable_avatar", "hunyuan_avatar"]
    for row in rows:
        assert row["relative_difference"] < 1e-6
        assert row["loop_mb"] > 2 * row["fused_mb"]
        assert row["weights_bytes"] == 8 * row["windows"] * 5  # a number per frame of a window, none per element
