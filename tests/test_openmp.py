# SPDX-License-Identifier: Apache-2.0
"""Commands choose how threads wait before torch is loaded, and leave the choice to who has made one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from talkingdit.openmp import wait_briefly, waiting

TOLD = "import os, sys; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize("start", ["from talkingdit.cli.main import main; main(['--help'])", "import training"])
@pytest.mark.parametrize(("chosen", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_wait_briefly(start: str, chosen: dict[str, str], expected: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | chosen
    done = subprocess.run(
        [sys.executable, "-c", f"{start}\n{TOLD}"],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == expected


def test_a_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    wait_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
    assert waiting() == "OMP_WAIT_POLICY=active"
