# SPDX-License-Identifier: Apache-2.0
"""What a run keeps beside its output goes with it, however it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from talkingdit.scratch import ScratchFolder

HOLD = "import sys, pathlib, time; from talkingdit.scratch import ScratchFolder; "
HOLD += "folder = ScratchFolder(pathlib.Path(sys.argv[1])); print(folder.name, flush=True); time.sleep(60)"


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    foreign = tmp_path / "talkingdit-notes"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("kept")
    run = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    left = Path(run.stdout.readline().strip())
    (left / "large.bin").write_bytes(b"0" * 1000)

    beside = ScratchFolder(tmp_path)
    assert left.is_dir()  # of a run that lives
    run.kill()
    run.wait()
    run.stdout.close()
    after = ScratchFolder(tmp_path)
    assert not left.exists()
    assert Path(beside.name).is_dir()
    assert (foreign / "mine.txt").read_text() == "kept"

    for folder in (beside, after):
        folder.cleanup()
        assert not Path(folder.name).exists()


def test_a_folder_is_removed_once(tmp_path: Path) -> None:
    folder = ScratchFolder(tmp_path)
    name = Path(folder.name)
    assert name.parent == tmp_path
    folder.cleanup()
    folder.cleanup()
    assert not name.exists()
