# SPDX-License-Identifier: Apache-2.0
"""The bench of fresh results measures in processes of their own, with memory whole and in pieces."""

from __future__ import annotations

import json
from pathlib import Path

from bench import fresh_results


def test_runs_take_turns_and_the_lowest_ratio_is_told(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert (
        fresh_results.main(["--runs", "2", "--repeats", "3", "--shape", "quick", "--taken", "0.001", "--out", str(out)])
        == 0
    )
    found = json.loads(out.read_text())
    assert [row["in_pieces"] for row in found["rows"]] == [False, True]
    assert found["lowest_ratio"] == min(row["ratio"] for row in found["rows"])
    for row in found["rows"]:
        assert abs(row["ratio"] - row["sdpa_us"] / row["ours_us"]) < 0.02


def test_every_second_page_is_held() -> None:
    size = 64 * fresh_results.mmap.PAGESIZE
    held = fresh_results.in_pieces(size)
    pages = [held[at] for at in range(0, size, fresh_results.mmap.PAGESIZE)]
    assert pages == [0, 1] * 32
