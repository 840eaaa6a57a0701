# SPDX-License-Identifier: Apache-2.0
"""The bench of the step cache counts what it skips and compares with the whole."""

from __future__ import annotations

from bench import step_cache


def test_rows_tell_what_a_threshold_costs() -> None:
    whole, cached = step_cache.run(1, [4], 1, thresholds=(0.0, 0.3))["steps_of"]
    assert (whole["computed"], whole["time_ratio"], whole["psnr"]) == (4, 1.0, None)
    assert 2 <= cached["computed"] < 4
    assert 20 < cached["psnr"] < 60
