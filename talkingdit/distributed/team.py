# SPDX-License-Identifier: Apache-2.0
"""Several processes that do one job, started by torchrun: who speaks, and how they stop together.

All run the same program. Rank 0 alone reads and writes files, asks and tells; the others get from it what they
need. What goes wrong in one place that all wait for ends all of them, with one sentence. What goes wrong in the midst
of a computation ends one process, and torchrun then ends the others.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from talkingdit.distributed.restart import arguments_of_restart
from talkingdit.errors import UserError

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # of a terminal, and of schedulers that want their machine back
STATUS = {UserError: 2, KeyboardInterrupt: 130}  # of the command line; anything else is 1
PATIENCE = timedelta(minutes=30)  # with a step of a computation: a process that is gone is noticed at once, one that
# hangs only by this
CONTROL_PATIENCE = timedelta(days=1)  # with rank 0, which may have a long video to write


class OtherRankError(Exception):
    """Something went wrong in another process, which tells it.

    Args:
        status: exit status of the command line.
    """

    def __init__(self, status: int):
        super().__init__("stopped by an error in another process")
        self.status = status


def status_of(error: BaseException) -> int:
    """The exit status for an error."""
    if isinstance(error, OtherRankError):
        return error.status
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 1)


class Team:
    """The processes of one job. Without torchrun it is this one alone, and nothing here costs anything.

    Every method but `exit` is called by all processes at the same place.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, control: dist.ProcessGroup | None = None):
        self.rank, self.size, self.local = rank, size, local
        self._control = control
        self._interrupted = False
        self._handlers: dict[signal.Signals, Any] = {}
        self._own_group = False

    @staticmethod
    def start() -> Team:
        """The team that torchrun's environment tells of, or that of a process group that exists.

        From here to `end`, SIGINT and SIGTERM take effect only at the places where all processes agree on it.

        Raises:
            UserError: the other processes cannot be reached.
        """
        own = not dist.is_initialized()
        if own and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return ALONE
        if own:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            try:
                dist.init_process_group(backend, timeout=PATIENCE, **arguments_of_restart(PATIENCE))
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0].rstrip(".")
                raise UserError(f"the other processes cannot be reached ({reason}).") from error
        if dist.get_world_size() == 1:
            return ALONE
        control = dist.new_group(backend="gloo", timeout=CONTROL_PATIENCE)
        team = Team(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), control)
        team._own_group = own
        if own and threading.current_thread() is threading.main_thread():
            team._handlers = {number: signal.signal(number, team._interrupt) for number in SIGNALS}
        return team

    def end(self) -> None:
        """Wait for all and part. Not after an error: then `exit`."""
        if self.size == 1:
            return
        dist.barrier(self._control)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._own_group:
            dist.destroy_process_group()

    def device(self, name: str) -> str:
        """The device of this process: with "cuda" each on a machine gets a card of its own.

        Raises:
            UserError: there are too few cards, or all processes would share one.
        """
        if self.size == 1 or not name.startswith("cuda"):
            return name
        cards, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if here > 1 and name != "cuda":
            raise UserError(f"the device {name!r} would be shared by {here} processes; give cuda.")
        if self.local >= cards:
            raise UserError(f"{here} processes on this machine need as many GPUs, found {cards}.")
        if name == "cuda":
            name = f"cuda:{self.local}"
        torch.cuda.set_device(name)
        return name

    def exit(self, status: int) -> NoReturn:
        """End this process after an error, without waiting for what the others no longer do."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True

    def _interruptible(self, work: Callable[[], T]) -> T:
        """Call a function which an interrupt may end, as nobody waits for messages in it."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        try:
            return work()
        finally:
            for number in self._handlers:
                signal.signal(number, self._interrupt)

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """What a function gives in rank 0, which alone calls it. It must bear pickling.

        Raises:
            OtherRankError: on the other ranks, where it raised.
        """
        if self.size == 1:
            return work()
        status, _, result = _broadcast_outcome(lambda: self._interruptible(work), self._control)
        if status:
            raise OtherRankError(status)
        return result

    def on_all_ranks(self, work: Callable[[], T]) -> T:
        """What a function gives, which all processes call, each for itself; it must not talk to the others.

        Raises:
            OtherRankError: where it raised on another rank.
        """
        if self.size == 1:
            return work()
        result: T
        raised: BaseException | None = None
        try:
            result = self._interruptible(work)
        except BaseException as error:
            raised = error
        states = torch.zeros(self.size, dtype=torch.int64)
        states[self.rank] = 0 if raised is None else status_of(raised)
        dist.all_reduce(states, group=self._control)
        failed = states.nonzero().flatten().tolist()
        if not failed:
            return result
        if raised is not None and failed[0] == self.rank:  # one of them tells
            raise raised
        raise OtherRankError(int(states[failed[0]])) from raised

    def broadcast(self, make: Callable[[], Tensor], device: torch.device | str) -> Tensor:
        """What a function gives in rank 0, which alone calls it, on every process's device.

        Raises:
            OtherRankError: on the other ranks, where it raised.
        """
        if self.size == 1:
            return make().to(device)
        result: Tensor | None = None

        def describe() -> tuple[torch.Size, torch.dtype]:
            nonlocal result
            result = make().to(device).contiguous()
            return result.shape, result.dtype

        shape, dtype = self.on_rank_0(describe)
        if result is None:
            result = torch.empty(shape, dtype=dtype, device=device)
        # Over the network of the device where it has one; the group of the control is the host's.
        dist.broadcast(result, src=0, group=self._control if result.is_cpu else None)
        return result

    def raise_if_interrupted(self) -> None:
        """End all processes if one of them was interrupted. Called between steps.

        Raises:
            KeyboardInterrupt: on rank 0; OtherRankError on the others.
        """
        if self.size == 1:
            return
        flag = torch.tensor([int(self._interrupted)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control)
        if flag.item():
            raise KeyboardInterrupt if self.rank == 0 else OtherRankError(STATUS[KeyboardInterrupt])


ALONE = Team()


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Tensors of one shape of all processes of a group, one behind the other along the first axis."""
    everything = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    # The name since torch 2.13, which warns about the other.
    into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    into(everything, x.contiguous(), group=group)
    return everything


def from_rank_0(make: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What a function gives on rank 0, which alone calls it, on all ranks. It must bear pickling.

    Where there is no process group it is just called.

    Args:
        group: over which it is broadcast; None is the default group.

    Raises:
        UserError: on all ranks, where it raised one.
        OtherRankError: on the others, where it raised something else.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return make()
    status, sentence, result = _broadcast_outcome(make, group)
    if sentence:
        raise UserError(sentence)
    if status:
        raise OtherRankError(status)
    return result


def from_all_ranks(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank of a group has, in the order of ranks, on all of them. It must bear pickling.

    Where there is no process group it is this one's alone.

    Args:
        group: over which it is gathered; None is the default group.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _broadcast_outcome(make: Callable[[], T], group: dist.ProcessGroup | None) -> tuple[int, str, T]:
    """What came of a call on rank 0, on all ranks: exit status, the sentence of a `UserError`, and the result.

    On rank 0 an error is raised after the others were told.
    """
    outcome: list[Any] = [None]
    raised: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [(0, "", make())]
        except BaseException as error:
            raised = error
            outcome = [(status_of(error), str(error) if isinstance(error, UserError) else "", None)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if raised is not None:
        raise raised
    return outcome[0]


def lost(error: BaseException) -> bool:
    """Whether an error says no more than that another process has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
