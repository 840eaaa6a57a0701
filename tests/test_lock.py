# SPDX-License-Identifier: Apache-2.0
"""Two runs do not meet: the second gets one sentence, and what a killed run leaves locks nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from talkingdit import lock as locks
from talkingdit.errors import UserError
from talkingdit.lock import RunLock, changing, lock_of

HOLD = """
import sys, time
from pathlib import Path
from talkingdit.lock import RunLock
lock = RunLock(Path(sys.argv[1]), "there", "holding", sys.argv[2])
print("has it", flush=True)
time.sleep(600)
"""


ADD = """
import sys
from pathlib import Path
from talkingdit.atomic import write_whole
from talkingdit.lock import changing
table, name = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    with changing(table, "adding"):
        write_whole(table, table.read_bytes() + f"{name} {number}\\n".encode())
"""


@pytest.fixture
def hold():
    """hold(file, run): another process that has the lock."""
    running: list[subprocess.Popen] = []

    def start(file: Path, run: str = "") -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(file), run]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        assert running[-1].stdout.readline() == "has it\n", running[-1].stderr.read()
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_the_second_run_is_told_who_has_it(tmp_path: Path, hold: Callable) -> None:
    process = hold(tmp_path / "lock")
    with pytest.raises(UserError) as error:
        RunLock(tmp_path / "lock", tmp_path, "talkingdit generate")
    who = f"another run (holding, process {process.pid} on {socket.gethostname()})"
    assert str(error.value) == f"{tmp_path}: {who} is at work there; wait for it, or end it first."
    assert json.loads((tmp_path / "lock").read_text())["process"] == process.pid  # nothing of it was changed


def test_a_lock_goes_with_its_process_however_that_ends(tmp_path: Path, hold: Callable) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = hold(tmp_path / "lock")
        process.send_signal(number)
        process.wait()
        assert (tmp_path / "lock").exists()
        with RunLock(tmp_path / "lock", tmp_path, "again"):
            assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "not JSON", "[1]", '{"host": "elsewhere", "process": 1, "run": ""}', "[" * 4000])
def test_whatever_a_file_says_that_nobody_holds_it_is_stale(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    RunLock(tmp_path / "lock", tmp_path, "work").release()
    assert list(tmp_path.iterdir()) == []


def test_processes_of_one_run_share_it_and_others_wait_for_the_last(tmp_path: Path, hold: Callable) -> None:
    first, second = hold(tmp_path / "lock", "run 1"), hold(tmp_path / "lock", "run 1")
    mine = RunLock(tmp_path / "lock", tmp_path, "work", "run 1")
    for process in (first, second):
        for other in ("", "run 2"):
            with pytest.raises(UserError, match="is at work there"):
                RunLock(tmp_path / "lock", tmp_path, "work", other)
        process.kill()
        process.wait()
    with pytest.raises(UserError):
        RunLock(tmp_path / "lock", tmp_path, "work")
    mine.release()
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path / "lock", tmp_path, "work").release()


def test_one_of_a_run_that_is_done_leaves_the_lock_to_the_others(tmp_path: Path, hold: Callable) -> None:
    process = hold(tmp_path / "lock", "run 1")
    RunLock(tmp_path / "lock", tmp_path, "work", "run 1").release()
    with pytest.raises(UserError, match=f"process {process.pid} "):
        RunLock(tmp_path / "lock", tmp_path, "work")


def test_a_forked_child_does_not_keep_the_lock_of_its_parent(tmp_path: Path) -> None:
    """A worker that outlives a killed run for a moment must not stop the next."""
    lock = RunLock(tmp_path / "lock", tmp_path, "work")
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    lock.release()
    RunLock(tmp_path / "lock", tmp_path, "work").release()
    os.close(theirs)
    os.waitpid(child, 0)


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        RunLock(tmp_path / "lock", tmp_path, "work")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_file_system_without_locks_goes_by_the_process(
    tmp_path: Path, hold: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = hold(tmp_path / "lock")

    def unknown(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", unknown)
    assert locks.fcntl is fcntl
    with pytest.raises(UserError, match=f"process {process.pid} "):
        RunLock(tmp_path / "lock", tmp_path, "work")
    process.kill()
    process.wait()
    RunLock(tmp_path / "lock", tmp_path, "work").release()


def test_who_gets_it_among_many_at_once_is_one(tmp_path: Path) -> None:
    """Three take and remove one file fifty times each: never two at a time, and all come to an end."""
    code = (
        "import sys, os\nfrom pathlib import Path\nfrom talkingdit.lock import RunLock\n"
        "from talkingdit.errors import UserError\n"
        "folder, got = Path(sys.argv[1]), 0\n"
        "while got < 50:\n"
        "    try: lock = RunLock(folder / 'lock', folder, 'work')\n"
        "    except UserError: continue\n"
        "    os.close(os.open(folder / 'only one', os.O_CREAT | os.O_EXCL))\n"
        "    (folder / 'only one').unlink()\n"
        "    lock.release(); got += 1\n"
    )
    takers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [taker.wait(120) for taker in takers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_rows_that_two_processes_add_to_one_table_at_once_are_all_there(tmp_path: Path) -> None:
    """Each reads the table and writes it whole: without a lock the last one to write drops what the others added."""
    table = tmp_path / "table"
    table.write_text("head\n")
    (tmp_path / "link").symlink_to(table)
    names = ("table", "link")
    adding = [
        subprocess.Popen(
            [sys.executable, "-c", ADD, str(tmp_path / name), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in names
    ]
    for process in adding:
        assert process.stdout.readline() == b"ready\n"
    for process in adding:
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.wait(60) for process in adding] == [0, 0]
    rows = table.read_text().splitlines()
    assert sorted(rows) == sorted(["head", *(f"{name} {number}" for name in names for number in range(40))])
    assert {path.name for path in tmp_path.iterdir()} == {"table", "link"}


def test_the_lock_of_a_file_is_waited_for_as_long_as_is_said(tmp_path: Path, hold: Callable) -> None:
    process = hold(tmp_path / ".table.lock")
    with pytest.raises(UserError, match=rf"table: another run \(holding, process {process.pid} on"):
        lock_of(tmp_path / "table", "adding", patience=0.2)
    process.kill()
    with changing(tmp_path / "table", "adding"):
        assert (tmp_path / ".table.lock").exists()
    assert list(tmp_path.iterdir()) == []
