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


def test_a_slow_process_does_not_decide() -> None:
    """A row is the median over rounds."""
    key = ("a", "s", "float32", "forward")
    (row,) = before.rows_of([{key: {"old": 10.0, "new": us}} for us in (10.0, 90.0, 9.0)])
    assert (row["old_us"], row["new_us"], row["new_to_old"]) == (10.0, 10.0, 1.0)
    assert row["new_rounds_us"] == [10.0, 90.0, 9.0]


def test_ops_by_their_geometric_mean_and_their_worst_case() -> None:
    rows = [{"op": "a", "new_to_old": 0.5}, {"op": "a", "new_to_old": 2.0}, {"op": "b", "new_to_old": 0.9}]
    assert before.summary(rows) == {
        "a": {"cases": 2, "mean": 1.0, "largest": 2.0},
        "b": {"cases": 1, "mean": 0.9, "largest": 0.9},
    }
