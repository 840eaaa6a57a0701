# SPDX-License-Identifier: Apache-2.0
"""A kill at a saving moment loses nothing, and the rerun completes what nobody disturbed would have made.

tools/kill_trials.py does the same at as many moments as one likes.
"""

from __future__ import annotations

import shutil
import sys

import pytest
from trials import Report, choose, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="moments.c stands before the C library of Linux"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


WRITERS, KILLS = ["generate", "precompute", "train", "export", "eval"], 5


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """By writer; one program tries all, as its imports take longer than a trial."""
    made = start(WRITERS, KILLS, tmp_path_factory.mktemp("kills"), timeout=1800)
    return {report.writer: report for report in made}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_while_something_is_saved_loses_nothing(reports: dict[str, Report], writer: str) -> None:
    report = reports[writer]
    assert report.faults == []
    assert (report.kills, report.completed, report.equal) == (KILLS, KILLS, KILLS)
    assert report.moments > 2 * KILLS


def test_kills_are_aimed_at_more_than_writes() -> None:
    moments = [*["write a"] * 90, *["rename a"] * 10]
    chosen = choose(moments, 10)
    assert len(set(chosen)) == 10
    assert sum(number > 90 for number in chosen) >= 5
    assert choose(moments, 200) == list(range(1, 101))
