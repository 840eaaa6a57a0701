# SPDX-License-Identifier: Apache-2.0
"""Two trainings do not meet in one folder, two exports not in one target, and a full disk is one sentence."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors import SafetensorError
from test_signals import environment

from talkingdit.errors import UserError
from talkingdit.lock import RunLock
from training import metrics
from training.metrics import Writer
from training.one_run import one_run, written
from training.sections import LogConfig

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def entered(folder: Path) -> str:
    try:
        with one_run(folder, "training"):
            return "in"
    except UserError as error:
        return str(error)


def test_every_rank_is_told_that_another_run_has_the_folder(processes, tmp_path: Path) -> None:
    with RunLock(tmp_path / ".lock", tmp_path, "training"):
        first, second = processes(2, entered, tmp_path)
    assert first == second
    assert first.startswith(f"{tmp_path}: another run (training, process {os.getpid()} on ")
    assert processes(2, entered, tmp_path / "new") == ["in", "in"]
    assert list((tmp_path / "new").iterdir()) == []


def test_the_second_training_of_a_folder_says_who_is_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.train", "--run.out", str(tmp_path), "--data.voices", str(tmp_path)]
    with RunLock(tmp_path / ".lock", tmp_path, "training"):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert f"training: {tmp_path}: another run (training, process {os.getpid()} on " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def failing(target: Path, error: Exception) -> str:
    def write() -> None:
        assert dist.get_rank() == 0
        raise error

    with pytest.raises(UserError) as told:
        written(target, write, "export")
    return str(told.value)


@pytest.mark.parametrize("error", [FULL, SafetensorError("I/O error: No space left on device")])
def test_a_disk_that_is_full_at_an_export_is_told_by_every_rank(processes, tmp_path: Path, error: Exception) -> None:
    messages = processes(2, failing, tmp_path / "model", error)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{tmp_path / 'model'}: cannot be written (")
    assert "No space left on device" in messages[0]
    assert list(tmp_path.iterdir()) == []


def test_two_exports_do_not_meet(processes, tmp_path: Path) -> None:
    with RunLock(tmp_path / ".model.lock", tmp_path / "model", "export"):
        messages = processes(2, failing, tmp_path / "model", FULL)
    assert messages[0] == messages[1]
    assert "model: another run (export, process " in messages[0]


def test_a_disk_that_is_full_while_logging_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path, 0, LogConfig(tensorboard=False), {})
    writer.scalars({"loss": 1.0}, 1)

    def full(*_: object) -> None:
        raise FULL

    before = (tmp_path / "log.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append_line", full)
        with pytest.raises(UserError) as error:
            writer.scalars({"loss": 2.0}, 2)
    assert str(error.value) == (
        f"training: the log in {tmp_path} cannot be written (No space left on device); the same command goes on from "
        "the last checkpoint."
    )
    assert (tmp_path / "log.jsonl").read_text() == before
    again = Writer(tmp_path, 1, LogConfig(tensorboard=False), {})
    again.scalars({"loss": 2.0}, 2)
    assert [line.count("loss") for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 1]


def test_tensorboard_on_a_full_disk_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path, 0, LogConfig(tensorboard=True), {})

    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(type(writer._board), "add_scalar", full)
    with pytest.raises(UserError, match="No space left on device"):
        writer.scalars({"loss": 2.0}, 2)


def test_a_log_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"log.jsonl is a link"):
        Writer(tmp_path / "run", 0, LogConfig(tensorboard=False), {})
    assert (tmp_path / "precious").read_text() == "theirs"
