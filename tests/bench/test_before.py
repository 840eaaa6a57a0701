# SPDX-License-Identifier: Apache-2.0
"""The comparison of all ops with another build: rows of what both have, in turns."""

from __future__ import annotations

import json
from pathlib import Path

from bench import before


def test_a_build_against_itself(tmp_path: Path) -> None:
    """As many rows as there are cases, each with what it was and what it is."""
    assert (
        before.main(
            [
                "rope3d",
                "--old",
                ".",
                "--quick",
                "--rounds",
                "2",
                "--samples",
                "2",
                "--threads",
                "2",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    result = json.loads((tmp_path / "cpu-before.json").read_text())
    assert {(row["dtype"], row["direction"]) for row in result["rows"]} == {
        (dtype, direction) for dtype in ("float32", "bfloat16") for direction in ("forward", "backward")
    }
    assert all(row["old_us"] > 0 and row["new_us"] > 0 and len(row["new_rounds_us"]) == 2 for row in result["rows"])
    assert result["threads"] == 2
    assert result["ops"]["rope3d"]["cases"] == len(result["rows"])


def test_neither_a_slow_process_nor_a_slow_minute_decides() -> None:
    """A row compares within rounds: the machine may be three times as slow in one of them."""
    key = ("a", "s", "float32", "forward")
    rounds = [{key: {"old": old, "new": new}} for old, new in ((10.0, 10.0), (10.0, 90.0), (30.0, 27.0))]
    (row,) = before.rows_of(rounds)
    assert (row["old_us"], row["new_us"], row["new_to_old"]) == (10.0, 27.0, 1.0)
    assert row["new_rounds_us"] == [10.0, 90.0, 27.0]


def test_ops_by_their_geometric_mean_and_their_worst_case() -> None:
    rows = [{"op": "a", "new_to_old": 0.5}, {"op": "a", "new_to_old": 2.0}, {"op": "b", "new_to_old": 0.9}]
    assert before.summary(rows) == {
        "a": {"cases": 2, "mean": 1.0, "largest": 2.0},
        "b": {"cases": 1, "mean": 0.9, "largest": 0.9},
    }


def test_results_of_builds_lie_in_memory_that_they_have_had_before() -> None:
    """Without it a build may be twice as slow as itself, for the pages that it was given."""
    with_memory = before.Build(Path(), 1, quick=True)
    try:
        with_memory.ask("cases rope3d")  # it runs
        environment = Path(f"/proc/{with_memory.process.pid}/environ").read_text()
    finally:
        with_memory.close()
    assert f"GLIBC_TUNABLES={before.MEMORY}" in environment.replace("\0", ":")  # glibc ends each setting as it reads it
