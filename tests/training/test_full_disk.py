# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up under a run of two processes: one sentence, nothing torn, and the same command completes it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Ranks, training
from small_run import make_world, read_log, save_config

from training.checkpoint import Checkpoints
from training.config import Config

PATIENCE = 300


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_world(tmp_path_factory.mktemp("world"))


def fill(disk: Path) -> None:
    """Take all room that is left."""
    with (disk / "filler").open("ab", buffering=0) as filler:
        try:
            while True:
                filler.write(b"\0" * 4096)
        except OSError:
            return


def run(config: Config, disk: Path, meanwhile: Callable[[], bool]) -> tuple[list[int], str]:
    """Train in two processes; as soon as `meanwhile` says so, the disk is full."""
    file, filled = save_config(config, disk.parent / "configuration"), False

    def watch() -> None:
        nonlocal filled
        if not filled and meanwhile():
            fill(disk)
            filled = True

    options = ["--config", str(file), "--run.out", str(disk / "run")]
    return Ranks(2, training, *options, said=disk.parent / "said").wait(PATIENCE, watch)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["run/log.jsonl", "run/checkpoints/step-00000002.tmp/.metadata"])
def test_a_disk_that_fills_up_is_one_sentence_and_the_same_command_goes_on(
    config: Config, disk: Path, moment: str
) -> None:
    statuses, errors = run(config, disk, lambda: (disk / moment).exists())
    assert any(statuses), errors
    said = [line for line in errors.splitlines() if re.match("training: (?!stage )", line)]  # errors, not progress
    assert sum("No space left on device" in line for line in said) == 1, errors
    assert all("No space left on device" in line or "lost another process" in line for line in said), errors
    assert "Traceback (most recent call last)" not in errors
    checkpoints = disk / "run" / "checkpoints"
    for path in checkpoints.glob("step-????????"):
        assert Checkpoints(checkpoints, read_only=True).peek() is not None, path
    text = (disk / "run" / "log.jsonl").read_text() if (disk / "run" / "log.jsonl").exists() else ""
    assert not text or text.endswith("\n")

    if moment == "run/log.jsonl":  # going on is the same after both
        return
    (disk / "filler").unlink()
    statuses, errors = run(config, disk, lambda: False)
    assert statuses == [0, 0], errors
    assert [int(line["step"]) for line in read_log(disk / "run")] == [1, 2, 3, 4, 5, 6]
    assert (disk / "run" / "model" / "transformer" / "config.json").is_file()
    assert not list((disk / "run").glob("**/*.tmp"))
