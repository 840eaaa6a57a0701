# SPDX-License-Identifier: Apache-2.0
"""What is done aside: one clip is decoded and written while the next one is denoised.

A small model on a processor gains nothing from a second thread within its layers, which are too small to be shared. It
does gain from one thread that denoises and another that decodes what was denoised before. Beside a busy neighbour it
gains most: no thread waits at the end of every layer for one that the system has put aside.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

_lock = threading.Lock()
_users = 0
_whole = 0  # threads of a layer outside of `half_of_the_threads`


@contextlib.contextmanager
def half_of_the_threads() -> Iterator[int]:
    """Let torch use half of its threads, at least one: the other half is for what is done aside.

    Results depend on the number of threads in their last bits. What can be done aside is computed so everywhere, aside
    or not, and is the same then. Contexts may be nested, also in several threads; of those the one that was the first
    to enter must be the last to leave.

    Yields:
        The threads outside.
    """
    global _users, _whole
    with _lock:
        if not _users:
            _whole = torch.get_num_threads()
        _users += 1
        torch.set_num_threads(max(1, _whole // 2))  # of this thread, and of those that begin now
    try:
        yield _whole
    finally:
        with _lock:
            _users -= 1
            torch.set_num_threads(max(1, _whole // 2) if _users else _whole)


def report() -> dict[str, str]:
    """What torch's threads do on this machine: lines by name."""
    whole = torch.get_num_threads()
    half, when = ("1", "when it") if whole == 1 else (f"{whole // 2} each", "while the next")
    return {"threads": f"{whole}; drawn characters and Gloria: {half}, one clip is decoded {when} is denoised"}


class Aside:
    """A thread that does one thing after the other, at most one of them behind the caller.

    Leaving the `with` block waits for it.

    Args:
        really: False: everything is done at once, by the caller.
    """

    def __init__(self, really: bool) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aside") if really else None
        self._last: Future[None] | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Begin with a piece of work, once the one before is done.

        Raises:
            Whatever the one before has raised; then this one is not begun.
        """
        if self._thread is None:
            work()
            return
        self._wait()
        inference = torch.is_inference_mode_enabled()  # which every thread has for itself

        def run() -> None:
            with torch.inference_mode(inference):
                work()

        self._last = self._thread.submit(run)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Aside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        try:
            # What stops the caller is told rather than what its end does to the work that goes on.
            with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():
                self._wait()
        finally:
            self._thread.shutdown()
