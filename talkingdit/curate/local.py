# SPDX-License-Identifier: Apache-2.0
"""Watch videos in processes of this machine.

One process writes, the others watch; a worker is handed one video at a time. So a worker that dies, as a decoder may
take it down, costs the video that it had, which is tried once more by a new one; and a driver that dies leaves what it
noted.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from talkingdit.curate.measure import Record, Video, Watcher, broken_record
from talkingdit.curate.settings import USUAL, Watch, Write
from talkingdit.curate.versions import Versions, versions_of
from talkingdit.detect.given import GivenModel
from talkingdit.errors import UserError

TRIES = 2  # of a video whose worker died
START = "spawn"


@dataclass(frozen=True)
class Task:
    """What every worker needs.

    Args:
        watch: settings.
        folder: of the results, absolute.
        write: what is written; anchors are cut out on the way.
        given: the weights of slots.
    """

    watch: Watch
    folder: Path
    write: Write = USUAL
    given: Mapping[str, GivenModel] = field(default_factory=dict)

    def watcher(self, gpu: bool | None = None) -> Watcher:
        """What watches videos so."""
        return Watcher(self.watch, self.folder, self.write, gpu, self.given)

    @property
    def versions(self) -> Versions:
        return versions_of(self.watch, self.given, self.write)


def watch_here(task: Task, videos: Iterable[Video], note: Callable[[Record], None]) -> None:
    """In this process, one after the other."""
    watcher = task.watcher()
    for video in videos:
        note(watcher.record(video))


@dataclass
class _Worker:
    process: Any
    video: Video | None = None


def watch_in_processes(task: Task, videos: Iterable[Video], workers: int, note: Callable[[Record], None]) -> None:
    """In so many processes, each with one thread.

    Args:
        task: settings and folder.
        videos: to watch.
        workers: processes.
        note: called in this process for every video, in the order in which they are done.

    Raises:
        UserError: a worker cannot start, or has no place to write to.
    """
    left = deque(videos)
    tries: dict[str, int] = {}
    context: Any = multiprocessing.get_context(START)  # its type has no Process
    running: dict[Connection, _Worker] = {}

    def start() -> None:
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(task, there), daemon=True)
        with _one_thread():
            process.start()
        there.close()
        running[here] = _Worker(process)

    try:
        for _ in range(min(workers, len(left))):
            start()
        while running:
            for end in wait(list(running)):
                assert isinstance(end, Connection)
                worker = running[end]
                try:
                    kind, value = end.recv()
                except (EOFError, OSError):
                    del running[end]
                    _bury(worker, task, tries, left, note)
                    if left:
                        start()
                    continue
                if kind == "failed":
                    raise UserError(value)
                if kind == "record":
                    note(value)
                worker.video = left.popleft() if left else None
                with contextlib.suppress(OSError):  # it has just died, which is seen above
                    end.send(worker.video)
                if worker.video is None:
                    del running[end]
                    worker.process.join()
    finally:
        for worker in running.values():
            worker.process.kill()  # what it has not told is watched again
        for worker in running.values():
            worker.process.join()


def _bury(
    worker: _Worker, task: Task, tries: dict[str, int], left: deque[Video], note: Callable[[Record], None]
) -> None:
    """What becomes of the video of a worker that has died."""
    worker.process.join()
    video = worker.video
    code = worker.process.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
    if video is None:
        raise UserError(f"curate: a worker ended before it began ({how}).")
    tries[video.key] = tries.get(video.key, 0) + 1
    if tries[video.key] < TRIES:
        left.appendleft(video)
    else:
        note(broken_record(video, task.versions, f"{video.path}: {TRIES} workers died while they watched it ({how})."))


@contextlib.contextmanager
def _one_thread() -> Any:
    """Libraries read these when they are loaded, in the new process."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(task: Task, end: Connection) -> None:
    """What a worker does until it is told to stop, or its driver has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver stops its workers
    try:
        one_thread()
        watcher = task.watcher()
        end.send(("ready", None))
        while (video := end.recv()) is not None:
            end.send(("record", watcher.record(video)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        end.send(("failed", str(error)))
    except OSError as error:
        end.send(("failed", f"curate: {task.folder}: {error.strerror or error}; what is done is kept."))


def one_thread() -> None:
    """Workers are as many as there are cores; each uses one. Torch goes by OMP_NUM_THREADS."""
    import cv2

    cv2.setNumThreads(1)
