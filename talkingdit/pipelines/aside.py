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


class _Here(threading.local):
    """How far this thread is in `half_of_the_threads`."""

    depth = 0
    whole = 1  # threads of a layer outside


_here = _Here()


@contextlib.contextmanager
def half_of_the_threads() -> Iterator[int]:
    """Let torch use half of its threads in this thread, at least one: the other half is for what is done aside.

    Results depend on the number of threads in their last bits. What can be done aside is computed so everywhere, aside
    or not, and is the same then. Contexts may be nested. Those of other threads, and threads that begin meanwhile, are
    not touched: each has its own number.

    Yields:
        The threads outside.
    """
    if not _here.depth:
        _here.whole = torch.get_num_threads()
    _here.depth += 1
    try:
        if _here.depth == 1:
            _take(max(1, _here.whole // 2), _here.whole)
        yield _here.whole
    finally:
        _here.depth -= 1
        if not _here.depth:
            _take(_here.whole, _here.whole)


def _take(threads: int, beginning: int) -> None:
    """Set the threads of a layer of this thread, and of those threads that begin from now on."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
        if threads != beginning:  # torch knows no other way to set them than from a thread that then has them, too
            other = threading.Thread(target=torch.set_num_threads, args=(beginning,))
            other.start()
            other.join()


def _begin_inside(depth: int, threads: int, whole: int) -> None:
    """Have a thread that begins stand where the one stands that began it."""
    _here.depth, _here.whole = depth, whole
    _take(threads, whole if depth else threads)


def report() -> dict[str, str]:
    """What torch's threads do on this machine: lines by name."""
    whole = torch.get_num_threads()
    half, when = ("1", "when it") if whole == 1 else (f"{whole // 2} each", "while the next")
    return {"threads": f"{whole}; drawn characters and Gloria: {half}, one clip is decoded {when} is denoised"}


class Aside:
    """A thread that does one thing after the other, at most one of them behind the caller.

    Leaving the `with` block waits for it, whatever happens: nothing of what it uses goes away under it. A first
    interruption lets it finish; a second one has it give up, where the work looks at `given_up`.

    Args:
        really: False: everything is done at once, by the caller.
    """

    def __init__(self, really: bool) -> None:
        self.really = really
        self._thread: ThreadPoolExecutor | None = None
        if really:
            place = (_here.depth, torch.get_num_threads(), _here.whole)
            self._thread = ThreadPoolExecutor(1, "aside", initializer=_begin_inside, initargs=place)
        self._last: Future[None] | None = None
        self._given_up = threading.Event()

    @property
    def given_up(self) -> bool:
        """Will nobody take what is being done?"""
        return self._given_up.is_set()

    def do(self, work: Callable[[], None]) -> None:
        """Begin with a piece of work, once the one before is done.

        Raises:
            Whatever the one before has raised; then this one is not begun.
        """
        if self._thread is None:
            work()
            return
        self.wait()
        modes = (  # which every thread has for itself
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
        )

        def run() -> None:
            inference, autocast, dtype = modes
            with torch.inference_mode(inference), torch.autocast("cpu", dtype, autocast):
                work()

        self._last = self._thread.submit(run)

    def wait(self) -> None:
        """Wait for the last piece of work.

        Raises:
            Whatever it has raised.
        """
        if self._last is not None:
            self._last.result()

    def check(self) -> None:
        """Tell what has gone wrong, as soon as it has; waits for nothing.

        Raises:
            Whatever the last piece of work has raised.
        """
        if self._last is not None and self._last.done():
            self._last.result()

    def __enter__(self) -> Aside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        interruption: BaseException | None = None
        while self._thread is not None:
            try:
                self._thread.shutdown()
                break
            except BaseException as error:
                if kind is not None or interruption is not None:
                    self._given_up.set()
                interruption = error
        if interruption is not None:
            raise interruption
        if kind is None:  # what stops the caller is told rather than what its end does to the work that goes on
            self.check()
