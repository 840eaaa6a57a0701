# SPDX-License-Identifier: Apache-2.0
"""How a run ends: asked to, by an error of its own, or because another process is gone.

The exit status tells a script what happened: 0 the run is done, or saved after a signal; 1 an error, with a traceback;
2 something the user can correct, in one sentence; 3 another process is gone; 130 interrupted twice.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from talkingdit.distributed.team import OtherRankError
from talkingdit.errors import UserError

DONE, ERROR, USER_ERROR, PEER_LOST, INTERRUPTED = 0, 1, 2, 3, 130

# All processes of a machine may come to the same sentence. The first says it; when it ends, torchrun ends the others.
_OTHERS_WAIT_SECONDS = 3.0

# A terminal sends SIGINT to torchrun and to its processes, and torchrun passes its own on: two within moments are one.
_IMPATIENT_SECONDS = 5.0


class Stop:
    """Turns signals into a wish that all processes learn of at the same step, so that they can save together.

        with Stop() as stop:
            while not stop.agree():
                train_step()
            checkpoints.save(step, state)

    SIGTERM is sent by schedulers that take a machine back, SIGINT by Ctrl-C, SIGUSR1 by Slurm before the time is up
    (`--signal=USR1@300`). It is enough that one process receives one. A second SIGINT, five seconds or more after the
    first, interrupts at once, without saving.

    Args:
        timeout: seconds that a rank waits for the others at a step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, timeout: float = 1800.0) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        # On the host, so that asking does not wait for the GPU.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if several else None
        self._seen = 0
        self._first_interrupt: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        self.requested = False

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self, also: bool = False) -> bool:
        """Whether any process was asked to stop. A collective call, once per step: all get the same answer.

        Args:
            also: another reason of this process, such as a time that is up.
        """
        wish = torch.tensor([max(self._seen, int(also))], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(wish, dist.ReduceOp.MAX, self._group)
        if wish.item() > 1 and not self.requested and (self._group is None or dist.get_rank() == 0):
            name = signal.Signals(int(wish.item())).name
            print(f"training: {name}: saves and ends", file=sys.stderr, flush=True)
        self.requested = self.requested or bool(wish.item())
        return self.requested

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._first_interrupt is not None and now - self._first_interrupt >= _IMPATIENT_SECONDS:
                raise KeyboardInterrupt
            self._first_interrupt = self._first_interrupt or now
        self._seen = number


def run_guarded(main: Callable[[], int | None]) -> int:
    """Runs `main` and turns what it raises into a message and an exit status (see above).

    In a run of several processes an error ends this process at once, without waiting for threads that still talk to the
    others: these then see a closed connection, end in their turn, and torchrun can start all of them again.

    Returns:
        the status for sys.exit. Does not return after an error in a run of several processes.
    """
    try:
        return main() or DONE
    except UserError as error:
        return _end(USER_ERROR, f"training: {error}", error)
    except KeyboardInterrupt as error:
        return _end(INTERRUPTED, "training: interrupted; the same command continues from the last checkpoint", error)
    except Exception as error:
        if (reason := lost_peer(error)) is None:
            return _end(ERROR, "".join(traceback.format_exception(error)).rstrip(), error)
        rank = os.environ.get("RANK", "0")
        return _end(
            PEER_LOST,
            f"training: rank {rank} on {socket.gethostname()} lost another process ({reason}) and ends; the first "
            "error of the other ranks tells why. torchrun --max-restarts, or the same command, continues from the last "
            "checkpoint",
            None,
        )


def lost_peer(error: BaseException) -> str | None:
    """Why an error says that another process, not this one, failed or cannot be reached; None if it does not."""
    if isinstance(error, OtherRankError):
        return str(error)
    backend = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl", "c10d"))
    )
    if not backend:
        return None
    lines = [line.strip() for line in str(error).splitlines()]
    for sign in _SIGNS:
        for line in lines:
            if (at := line.lower().find(sign)) >= 0:
                return line[at : at + 100].split(". ")[0].rstrip(".")
    return None


_SIGNS = (  # as gloo, NCCL and the store say it
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection was likely closed",
    "broken pipe",
    "no route to host",
    "timed out",
    "timeout",
    "ncclremoteerror",
    "ncclsystemerror",
    "communicator was aborted",
    "failed to recv",
    "failed to send",
)


def _end(status: int, message: str, error: BaseException | None) -> int:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and status in (USER_ERROR, PEER_LOST) and os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_OTHERS_WAIT_SECONDS)
    print(message, file=sys.stderr, flush=True)
    if not several:
        return status
    if error is not None:  # torchrun shows the error of the process that failed first
        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)
    sys.stdout.flush()
    os._exit(status)
