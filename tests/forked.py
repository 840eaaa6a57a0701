# SPDX-License-Identifier: Apache-2.0
"""Processes that need not import torch and diffusers again, which takes longer than most tests.

They are forks of one process, multiprocessing's fork server, that has imported what tests import and has done nothing
else. For what happens before or by an import, and for the commands of a user, start a Python of its own instead.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOADED = ["training.loop", "diffusers.models.autoencoders.autoencoder_kl_wan", "peft", "pytest"]
GRACE = 30.0  # seconds that ranks have to end in after SIGTERM, as torchrun has it


def context() -> ForkServerContext:
    """Where processes come from; the server is started if there is none yet."""
    found = get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    folder = os.getcwd()
    os.chdir(ROOT)  # where the server finds `training`
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(folder)
    return found


def start(
    job: Callable[..., int | None], *args: Any, said: Path | None = None, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Starts a process that runs job(*args) and exits with the status that it returns.

    Args:
        job: a function of a module.
        said: file for the output of the process and its messages.
        environment: what is added to its environment.
    """
    process = context().Process(target=_run, args=(job, args, said, {**os.environ, **(environment or {})}))
    process.start()
    return process


def run(job: Callable[..., int | None], *args: Any, timeout: float = 120.0, **more: Any) -> int:
    """The exit status of a process that runs job(*args), that of a killed one negative, see `start`."""
    process = start(job, *args, **more)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"{job.__qualname__} was still running after {timeout:g} s")
    return process.exitcode


def training(*options: str) -> int:
    """`python -m training.train`, in the process that calls it."""
    import training.train

    sys.argv[1:] = options
    return training.train.main()


class Ranks:
    """Processes with the environment of torchrun, and, as with torchrun, an end for all after one has failed."""

    def __init__(self, size: int, job: Callable[..., int | None], *args: Any, said: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1}
        self.said = said
        self._files = [said.with_name(f"{said.name}-{rank}") for rank in range(size)]
        self.processes = [
            start(
                job,
                *args,
                said=file,
                environment={name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
            )
            for rank, file in enumerate(self._files)
        ]

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid or 0, number)

    def wait(self, timeout: float, meanwhile: Callable[[], Any] = lambda: None) -> tuple[list[int], str]:
        """Exit statuses by rank and all that was said. `meanwhile` is called again and again."""
        deadline, failed = time.monotonic() + timeout, False
        while self.running():
            meanwhile()
            if not failed and any(process.exitcode for process in self.processes):
                failed, deadline = True, min(deadline, time.monotonic() + GRACE)
                self.send_signal(signal.SIGTERM)
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
            time.sleep(0.001)
        return [process.exitcode or 0 for process in self.processes], "".join(file.read_text() for file in self._files)


def _run(job: Callable[..., int | None], args: Any, said: Path | None, environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if said is not None:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(file, stream)
    sys.exit(job(*args))
