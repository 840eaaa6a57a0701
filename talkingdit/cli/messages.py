# SPDX-License-Identifier: Apache-2.0
"""What the command says on stderr, and its exit status: one sentence for what a person can correct, never twice."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from talkingdit.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130


class UsageError(UserError):
    """The command line itself is wrong. The sentence names the command."""


def rank() -> int:
    """The number of this process among those of torchrun."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def warn(sentence: str) -> None:
    """Say what is done differently from what may be expected, or what went wrong."""
    sys.stderr.write(f"talkingdit: {sentence}\n")


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Obey a scheduler that wants its machine back as a person at the terminal: keep what is finished and say so.

    Once: a second SIGTERM does not disturb what the first one set off. A program that has its own handler keeps it.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def tell(error: BaseException) -> int:
    """Say what ended the command; returns its exit status.

    Raises:
        BaseException: the error itself, where nobody but a programmer can correct it.
    """
    if isinstance(error, UsageError):
        if not rank():  # all processes have the same arguments: one tells
            sys.stderr.write(f"{error}\n")
        return USER_ERROR
    if isinstance(error, UserError):
        warn(str(error))
        return USER_ERROR
    if isinstance(error, ImportError):
        warn(str(error))
        return 1
    if isinstance(error, KeyboardInterrupt):
        warn(str(error) or "interrupted; nothing was written.")
        return INTERRUPTED
    raise error


def tell_of_one(error: BaseException) -> int:
    """Say what ended one of several processes that work together; returns its exit status."""
    from talkingdit.distributed.team import OtherRankError, lost, status_of

    where = f"process {rank()}: " if rank() else ""
    if isinstance(error, UsageError):
        tell(error)
    elif isinstance(error, KeyboardInterrupt):
        warn(str(error) or "interrupted; nothing was written.")
    elif isinstance(error, UserError | ImportError):
        warn(f"{where}{error}")
    elif lost(error):
        warn(f"{where}stopped, because another process has ended.")
    elif not isinstance(error, OtherRankError):
        traceback.print_exception(error)
    return status_of(error)
