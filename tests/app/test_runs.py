# SPDX-License-Identifier: Apache-2.0
"""Runs on the disk, for whom they were made; one at a time, and how they end."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from talkingdit.app.asked import Asked, Machine
from talkingdit.app.queue import MOST_WAITING, Queue
from talkingdit.app.runs import Run, Runs, owner_of, take
from talkingdit.errors import UserError

ANNA, BEN = owner_of("a" * 20), owner_of("b" * 20)


class Made:
    """A worker that writes a video as long as it is not interrupted, or for as many reports as it is told."""

    alive = True

    def __init__(self, machine: Machine, model: object) -> None:
        self.model, self.stopped, self.killed = model, threading.Event(), threading.Event()
        self.log: list[str] = []

    def make(self, run: Run, hear: Callable[[dict[str, Any]], None]) -> None:
        self.stopped.clear()
        hear({"clips": 2, "steps": 2})
        for done in range(1, int(run.asked.options.get("reports", "4")) + 1):
            hear({"done": done, "total": 4})
            if self.killed.wait(0.01) or (self.stopped.is_set() and "deaf" not in run.asked.prompt):
                hear({"end": "stopped"})
                return
        run.video.write_bytes(b"video")
        hear({"end": "done", "took": 1.0, "first_after": 0.5})

    def interrupt(self) -> None:
        self.stopped.set()

    def kill(self) -> None:
        self.killed.set()

    def close(self) -> None:
        self.log.append("closed")

    def warm(self, asked: Asked) -> None:
        self.log.append("warm")


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    found = Runs(tmp_path / "data")
    yield found
    found.close()


@pytest.fixture
def queue(runs: Runs) -> Iterator[Queue]:
    found = Queue(runs, Machine(), Made)
    yield found
    found.close()


def added(runs: Runs, owner: str = ANNA, reports: int = 4, **asked: Any) -> Run:
    return runs.add(runs.new_folder(), owner, Asked(options={"reports": str(reports)}, **asked), "voice")


def wait(true: Callable[[], object]) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_run_is_found_again_by_whom_it_was_made_for_alone(runs: Runs) -> None:
    run = added(runs, prompt="waving")
    assert runs.of(ANNA) == [run]
    assert runs.of(BEN) == []
    assert runs.get(run.id, ANNA) is run
    for id, owner in ((run.id, BEN), ("../" + run.id, ANNA), ("", ANNA)):
        with pytest.raises(UserError, match="there is none of this name"):
            runs.get(id, owner)
    assert "a" * 20 not in (run.folder / "run.json").read_text()  # the token opens; its digest does not
    assert run.folder.stat().st_mode & 0o777 == 0o700


def test_the_next_server_finds_runs_and_what_they_asked_for(runs: Runs, tmp_path: Path) -> None:
    run = added(runs, prompt="waving", image="image.png")
    left = runs.new_folder()  # of a server that was killed before the run was written
    (left / "image.png").write_bytes(b"x")
    with pytest.raises(UserError, match="is at work there"):
        Runs(tmp_path / "data")
    runs.close()
    again = Runs(tmp_path / "data")
    (found,) = again.of(ANNA)
    again.close()
    assert dataclasses.asdict(found.asked) == dataclasses.asdict(run.asked)
    assert (found.state, found.sentence) == ("stopped", "the server was closed.")
    assert not left.exists()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("voice.wav", "audio.wav"),
        ("..hidden", "audio.hidden"),
        ("a.png/../../x.JPG", "audio.jpg"),
        ("quo\"te' ;$(x).mp3", "audio.mp3"),
        ("long." + "x" * 60, "audio"),
        ("new\nline.w\nv", "audio"),
    ],
)
def test_only_the_ending_of_a_file_name_is_kept(tmp_path: Path, name: str, kept: str) -> None:
    source = tmp_path / Path(name).name
    source.write_bytes(b"sound")
    folder = tmp_path / "run"
    folder.mkdir()
    assert take(source, folder, "audio") == kept
    assert os.listdir(folder) == [kept]


def test_runs_are_made_one_after_the_other(runs: Runs, queue: Queue) -> None:
    first, second, third = added(runs), added(runs, BEN), added(runs)
    seen = []
    for run in (first, second, third):
        queue.add(run)
    while not third.ended:
        seen.append([run.state for run in (first, second, third)])
        assert seen[-1].count("running") <= 1
        time.sleep(0.002)
    assert [run.state for run in (first, second, third)] == ["done"] * 3
    assert first.started <= second.started <= third.started
    assert Run.read(second.folder).took == 1.0


def test_stopping_ends_a_run_or_takes_it_out_of_the_queue(runs: Runs, queue: Queue) -> None:
    first, second = added(runs, reports=10_000), added(runs)
    queue.add(first)
    queue.add(second)
    wait(lambda: first.done)
    assert (queue.before(second), first.clip) == (1, first.done // 2 if first.done < 4 else 2)
    queue.stop(second)
    assert (second.state, second.sentence) == ("stopped", "stopped before it began.")
    (first.folder / "video.mp4.parts").mkdir()
    (first.folder / "video.mp4.parts" / "carry-0000.safetensors").touch()
    queue.stop(first)
    wait(lambda: first.ended)
    assert (first.state, first.sentence) == ("stopped", "stopped; 1 of 2 clips are kept.")
    queue.add(second)  # goes on
    wait(lambda: second.ended)
    assert second.state == "done"


def test_a_run_that_does_not_hear_is_killed(runs: Runs, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("talkingdit.app.queue.PATIENCE", 0.1)
    run = added(runs, reports=100_000, prompt="deaf")
    queue.add(run)
    wait(lambda: run.done)
    queue.stop(run)
    wait(lambda: run.ended)
    assert run.state == "stopped"


def test_one_person_cannot_fill_the_queue(runs: Runs, queue: Queue) -> None:
    queue.add(first := added(runs, reports=100_000))
    wait(lambda: first.state == "running")
    for _ in range(MOST_WAITING):
        queue.add(added(runs))
    with pytest.raises(UserError, match="are waiting already"):
        queue.add(added(runs))
    queue.add(added(runs, BEN))


def test_a_run_that_has_ended_goes_with_all_its_files(runs: Runs, queue: Queue) -> None:
    run = added(runs, reports=10_000)
    queue.add(run)
    runs.remove(run)
    assert run.folder.exists()  # it is at work
    queue.stop(run)
    wait(lambda: run.ended)
    runs.remove(run)
    assert not run.folder.exists()
    assert runs.of(ANNA) == []


def test_a_run_is_stopped_while_its_worker_is_being_started(runs: Runs) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(machine: Machine, model: object) -> Made:
        begun.set()
        assert go.wait(10)
        return Made(machine, model)

    queue = Queue(runs, Machine(), slow)
    run = added(runs, reports=10_000)
    queue.add(run)
    assert begun.wait(10)
    queue.stop(run)
    time.sleep(0.05)  # for whoever gives up without a worker
    go.set()
    wait(lambda: run.ended)
    assert run.state == "stopped"
    queue.close()


def test_a_worker_that_dies_costs_one_run(runs: Runs) -> None:
    """A real process, which is killed as the system does it when memory runs out."""
    from talkingdit.app.queue import WorkerProcess

    events: list[dict[str, Any]] = []
    worker = WorkerProcess(Machine(), None)
    worker.kill()
    worker.make(added(runs), events.append)
    worker.close()
    assert events == [
        {
            "end": "failed",
            "sentence": "the process that makes the video has ended by itself (most often memory runs out).",
        }
    ]
