# SPDX-License-Identifier: Apache-2.0
"""A kill at a saving moment loses nothing, and the rerun completes what nobody disturbed would have made.

tools/kill_trials.py does the same at as many moments as one likes.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from trials import choose, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="moments.c stands before the C library of Linux"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


@pytest.mark.parametrize(("writer", "kills"), [("generate", 5), ("precompute", 5), ("train", 4), ("export", 4)])
def test_a_kill_while_something_is_saved_loses_nothing(tmp_path: Path, writer: str, kills: int) -> None:
    (report,) = start([writer], kills, tmp_path, timeout=900)
    assert report.faults == []
    assert (report.kills, report.completed, report.equal) == (kills, kills, kills)
    assert report.moments > 2 * kills


def test_kills_are_aimed_at_more_than_writes() -> None:
    moments = [*["write a"] * 90, *["rename a"] * 10]
    chosen = choose(moments, 10)
    assert len(set(chosen)) == 10
    assert sum(number > 90 for number in chosen) >= 5
    assert choose(moments, 200) == list(range(1, 101))
