# SPDX-License-Identifier: Apache-2.0
"""The page of ablations says what the results say."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench import ablations_page

CELLS = {
    "fake/rope/full/0": {
        "steps": 1412,
        "training": {"row": "full", "seconds": 5400.0},
        "seconds": 1800.0,
        "measured": {"sync": 0.74, "lag": 0.0},
        "says": "a & b",
        "better": {"sync": True},
    },
    "fake/rope/no_rope/0": {"measured": {"sync": -0.05, "lag": 3.5}, "says": "a & b", "better": {"sync": True}},
    "fake/guidance/strong/0": {
        "training": {"row": "full", "seconds": 5400.0},
        "seconds": 3600.0,
        "measured": {"sync": 0.8},
        "says": "more",
        "better": {"sync": True},
    },
    "fake/rope/right_videos/0": {
        "steps": None,
        "training": None,
        "measured": {"sync": 1.0, "lag": 0.0},
        "says": "a & b",
        "better": {"sync": True},
    },
}


def test_a_line_per_row_and_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    results.write_text(json.dumps(CELLS))
    page.write_text("before\n<!-- bench:start -->\nold\n<!-- bench:end -->\nafter\n")
    monkeypatch.setattr(ablations_page, "RESULTS", results)
    monkeypatch.setattr(ablations_page, "PAGE", page)
    monkeypatch.setattr(ablations_page, "FIGURE", tmp_path / "figure.svg")
    assert ablations_page.main() == 0
    text = page.read_text()
    assert "| rope: a & b | full | 1,412 | sync ↑ 0.74, lag 0 |" in text
    assert "|  | no rope |  | sync ↑ -0.05, lag 3.5 |" in text
    assert "|  | right videos |  | sync ↑ 1, lag 0 |" in text
    assert "old" not in text
    assert (
        "Training of the 1 models of this table took 1.5 hours of one core, measuring its 4 rows 1.5: 1.5 hours of two"
        in text
    )
    assert text.startswith("before")
    assert text.endswith("after\n")
    shapes = ElementTree.parse(tmp_path / "figure.svg").iter("{http://www.w3.org/2000/svg}rect")
    _, full, without, *_ = (one.attrib["width"] for one in shapes)  # behind the paper
    assert float(full) > 100
    assert float(without) == 0


def test_what_was_measured_stands_on_the_page() -> None:
    """Whoever commits results makes the page anew."""
    cells = json.loads(ablations_page.RESULTS.read_text())
    assert ablations_page.table(cells) in ablations_page.PAGE.read_text()
    assert ablations_page.effort(cells) in ablations_page.PAGE.read_text()
    assert ablations_page.figure(cells) == ablations_page.FIGURE.read_text()
