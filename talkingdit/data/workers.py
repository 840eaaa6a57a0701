# SPDX-License-Identifier: Apache-2.0
"""`precompute` in several processes of one machine, each with a part of the manifest."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from talkingdit.data.precompute import FinishedVideo, PrecomputeJob, precompute
from talkingdit.errors import UserError

START = "spawn"  # CUDA does not survive a fork
GRACE_SECONDS = 30  # for workers that were interrupted, to finish what they write
# How a library that crashes ends its process. What somebody sends (SIGKILL, SIGTERM) is no crash.
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
MOST_CRASHES = 20  # of a worker; after that something else is wrong than a file
FAILED, STOPPED = 2, 130  # exit status of a worker that met a mistake in the input, or was interrupted


def device_of(device: str, worker: int) -> str:
    """The device of a worker: of several cards each in turn, where none is named."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{worker % max(1, torch.cuda.device_count())}"


def run_workers(
    job: PrecomputeJob, rank: int, world: int, workers: int, report: Callable[[FinishedVideo], None]
) -> None:
    """Encode part `rank` of `world` with `workers` processes.

    Args:
        job: what to do; its encoders are not loaded here when there are several workers.
        rank, world: which part of the manifest this machine (or this process of torchrun) has.
        workers: processes; 1 works in this one.
        report: called in this process after every video.

    Raises:
        UserError: as `precompute`, or a worker died. What finished shards hold is kept.
    """
    if workers == 1:
        precompute(_placed(job, rank), rank, world, report)
        return
    context: Any = multiprocessing.get_context(START)
    threads = max(1, (os.cpu_count() or 1) // workers)
    running: dict[Connection, PrecomputeWorker] = {}

    def start(number: int, seen: int = 0) -> None:
        here, there = context.Pipe(duplex=False)
        arguments = (_placed(job, number), number, world * workers, threads, there)
        process: BaseProcess = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        there.close()
        running[here] = PrecomputeWorker(number, process, seen)

    try:
        for number in range(rank * workers, (rank + 1) * workers):
            start(number)
        failures = _follow(running, report, start)
    finally:
        for worker in running.values():
            worker.process.terminate()  # those that still work finish their shards
        for worker in running.values():
            worker.process.join(GRACE_SECONDS)
            worker.process.kill()
    if failures:
        sentence = "; ".join(dict.fromkeys(failures))
        raise UserError(f"precompute: {sentence}; finished shards are kept, the same command goes on there.")


def _placed(job: PrecomputeJob, worker: int) -> PrecomputeJob:
    encoders = job.encoders
    placed = device_of(encoders.device, worker)
    return job if placed == encoders.device else dataclasses.replace(
        job, encoders=dataclasses.replace(encoders, device=placed)
    )  # fmt: skip


@dataclasses.dataclass
class PrecomputeWorker:
    """A process that works.

    Args:
        number: of the worker that it is.
        process: at present.
        skip: videos that it reports first and an earlier process of the worker has reported already.
        told: videos that it has reported.
    """

    number: int
    process: BaseProcess
    skip: int = 0
    told: int = 0


def _follow(
    running: dict[Connection, PrecomputeWorker],
    report: Callable[[FinishedVideo], None],
    start: Callable[[int, int], None],
) -> list[str]:
    """Pass on what workers report until all have ended; returns what went wrong.

    A worker whose process a library took down is started again: what it read then is written down (`Claims`).
    """
    failures: list[str] = []
    crashes: dict[int, int] = {}
    while running:
        for end in wait(list(running)):
            assert isinstance(end, Connection)
            try:
                message = end.recv()
            except EOFError:
                worker = running.pop(end)
                worker.process.join()
                status = worker.process.exitcode
                crashes[worker.number] = crashes.get(worker.number, 0) + 1
                if status is not None and -status in CRASHES and crashes[worker.number] <= MOST_CRASHES:
                    start(worker.number, max(worker.told, worker.skip))
                elif status not in (0, FAILED):
                    failures.append(f"worker {worker.process.pid} ended with status {status}")
                continue
            if isinstance(message, str):
                failures.append(message)
                continue
            running[end].told += 1
            if running[end].told > running[end].skip:
                report(message)
    return failures


class _Interrupt:
    """What a worker does when it is told to end: it stops at once and finishes its shard.

    A terminal interrupts workers, and so does their parent: the second time must not tear what is being finished. An
    exception that comes while a library runs a finaliser or a callback is dropped there; then the worker ends at its
    next report.
    """

    def __init__(self) -> None:
        self.came = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        self.came = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises: KeyboardInterrupt: it came."""
        if self.came:
            raise KeyboardInterrupt


def _die_with_parent() -> None:
    """A worker must not go on writing beside the run that follows a killed one."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(STOPPED)

    threading.Thread(target=wait, daemon=True).start()


def _work(job: PrecomputeJob, rank: int, world: int, threads: int, parent: Connection) -> None:
    import torch

    _die_with_parent()
    interrupt = _Interrupt()
    torch.set_num_threads(threads)

    def report(step: FinishedVideo) -> None:
        parent.send(step)
        interrupt.check()

    try:
        precompute(job, rank, world, report)
    except UserError as error:
        parent.send(str(error).removeprefix("precompute: ").rstrip("."))
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(STOPPED)
