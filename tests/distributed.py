# SPDX-License-Identifier: Apache-2.0
"""Runs a function in several processes of one process group: the fixture `processes`.

The workers are started once and stay, so that a test does not pay for importing torch again. Every job gets a process
group of its own. After a failure nobody knows where the others stand, so all workers are then replaced.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import context

LIMIT = 4  # as many as a CI machine bears
START = 120.0  # seconds that a process may take until it has imported torch
GRACE = 2.0  # seconds that the other ranks have, after one failed or hangs, to tell their side


class JobFailed(Exception):
    """A job raised, died or hung in some rank. The message says which and holds its traceback."""


class Processes:
    """A pool of worker processes; `processes(4, job, *args)` runs job(*args) in four of them.

    The job must be a function of a module, its arguments and results picklable. It runs inside an initialised gloo
    group of that size, on one thread, with torch's seed 0 and torchrun's RANK, LOCAL_RANK and WORLD_SIZE set.
    """

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="processes-")
        self._jobs = 0

    def __call__(self, size: int, job: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Runs the job in `size` processes.

        Args:
            timeout: seconds after which the job counts as hung.

        Returns:
            What the job returned in rank 0, 1, ...

        Raises:
            JobFailed: when the job raised in any rank, a process died, or time ran out.
            ValueError: for more processes than LIMIT.
        """
        if not 1 <= size <= LIMIT:
            raise ValueError(f"processes: size must be from 1 to {LIMIT}, got {size}")
        self._jobs += 1
        store = Path(self._folder.name) / f"store-{self._jobs}"
        try:
            started = [_Worker(Path(self._folder.name)) for _ in range(size - len(self._workers))]
            self._workers += started
            for worker in started:
                worker.wait_until_ready()
            workers = self._workers[:size]
            for rank, worker in enumerate(workers):
                # Not the pickler of multiprocessing, which passes tensors in shared memory that ends with its owner.
                worker.connection.send_bytes(pickle.dumps((rank, size, str(store), timeout, sys.path)))
                worker.connection.send_bytes(pickle.dumps((job, args)))
            return _collect(workers, timeout)
        except BaseException:  # a keyboard interrupt, too, leaves workers in the middle of something
            self._kill()
            raise
        finally:
            store.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends the workers, which are idle, and removes their files."""
        for worker in self._workers:
            worker.connection.close()  # ends the worker's wait for a job
            worker.process.join(GRACE)
        self._kill()
        self._folder.cleanup()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._workers.clear()


class _Worker:
    """The parent's end of a worker."""

    def __init__(self, folder: Path) -> None:
        handle, log = tempfile.mkstemp(prefix="stack-", dir=folder)
        os.close(handle)
        self.log = Path(log)
        # Not forks of this process: locks that torch's threads held at that moment would stay locked in the child for
        # ever. The fork server has none. Not a daemon: those may not have children, which a data loader starts.
        forked = context()
        self.connection, theirs = forked.Pipe()
        self.process = forked.Process(target=_serve, args=(theirs, log))
        self.process.start()
        theirs.close()  # so that the worker's death is seen as the end of the pipe

    def wait_until_ready(self) -> None:
        if not self.connection.poll(START):
            raise JobFailed(f"a worker did not start within {START:g} s")
        self.connection.recv_bytes()


@dataclass
class _Answer:
    """What came back from a rank: the job's result, or why there is none."""

    result: Any = None
    error: str | None = None


def _collect(workers: list[_Worker], timeout: float) -> list[Any]:
    answers: dict[int, _Answer] = {}
    failed: list[int] = []  # in the order in which they were heard: the first is the likely cause
    deadline = time.monotonic() + timeout
    while len(answers) < len(workers):
        waiting = {workers[rank].connection: rank for rank in range(len(workers)) if rank not in answers}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting[connection]
            answers[rank] = _receive(workers[rank])
            if answers[rank].error is not None:
                failed.append(rank)
                deadline = min(deadline, time.monotonic() + GRACE)
        if not ready:
            break
    if failed:
        raise JobFailed("\n".join(f"rank {rank} of {len(workers)}: {answers[rank].error}" for rank in failed))
    if len(answers) < len(workers):
        time.sleep(GRACE)  # the hung ranks write down where they are
        stacks = [
            f"rank {rank} of {len(workers)} was still running after {timeout:g} s:\n{worker.log.read_text()}"
            for rank, worker in enumerate(workers)
            if rank not in answers
        ]
        raise JobFailed("\n".join(stacks))
    return [answers[rank].result for rank in range(len(workers))]


def _receive(worker: _Worker) -> _Answer:
    try:
        message = worker.connection.recv_bytes()
    except (EOFError, ConnectionResetError):
        worker.process.join(GRACE)
        where = worker.log.read_text()
        return _Answer(error=f"the process died with exit code {worker.process.exitcode}\n{where}")
    try:
        return pickle.loads(message)
    except Exception:
        return _Answer(error=f"the result cannot be unpickled\n{traceback.format_exc()}")


def _serve(connection: Connection, log: str) -> None:
    """The worker's loop, until the parent closes the pipe or is gone."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would ask for the host's name, which may not resolve
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays for good; the collection after every job passes it over
    with open(log, "w") as stacks:
        faulthandler.enable(stacks)
        connection.send_bytes(b"ready")
        while True:
            try:
                rank, size, store, timeout, path = pickle.loads(connection.recv_bytes())
                job = connection.recv_bytes()
            except (EOFError, ConnectionResetError):
                break
            sys.path[:] = path  # the folders of the test modules are in it
            faulthandler.dump_traceback_later(timeout, file=stacks)
            connection.send_bytes(_answer(job, rank, size, store, timeout))
            faulthandler.cancel_dump_traceback_later()
            if dist.is_initialized():
                break  # the job failed: the parent kills this process
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of gloo and of checkpoints may abort an orderly exit


def _answer(job: bytes, rank: int, size: int, store: str, timeout: float) -> bytes:
    """Runs the job in a group of its own; the pickled answer."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    try:
        function, args = pickle.loads(job)
        torch.manual_seed(0)
        # The group's patience is longer than the job's, which is the one that says where the ranks hang.
        patience = timedelta(seconds=timeout + 60)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=patience)
        answer = pickle.dumps(_Answer(result=function(*args)))
        if dist.is_initialized():  # unless the job has ended it
            gc.collect()  # what refers to the group goes before it
            dist.barrier()
            dist.destroy_process_group()
        return answer
    except BaseException:
        return pickle.dumps(_Answer(error=traceback.format_exc()))
