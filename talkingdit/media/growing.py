# SPDX-License-Identifier: Apache-2.0
"""Where a video goes that is watched while it is made: fragments of an MP4, to a file or into a pipe.

What was written at any moment plays: an index in front without times, and after it fragments with theirs. So a process
that is killed, a disk that is full and a reader that goes away leave a video of what was done.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from talkingdit.atomic import WholeFile

POLL = 100  # milliseconds; so often is looked whether there is hurry
PATIENCE = 2.0  # seconds for a reader that reads nothing, once somebody wants an end
FRAGMENT = 200_000  # microseconds of video in a fragment
# The index waits for the first fragment, as it says how much of the sound is the encoder's lead.
OPTIONS = {
    "movflags": "+delay_moov+default_base_moof",
    "frag_duration": str(FRAGMENT),
    "flush_packets": "1",  # nothing stays in a buffer between the muxer and the target
}


class Growing:
    """What the muxer makes, kept until it is passed on.

    PyAV loses an interruption that comes while it calls Python, and goes on. So it calls C, and bytes are passed on
    when it is back: whole fragments, as what is written for one frame is.

    Attributes:
        write: for the muxer.
    """

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self.write: Callable[[bytes], None] = self._pieces.append
        self._over = False  # nothing may follow what was cut off

    def pass_on(self) -> None:
        """Write what there is; it can be read at once. Does nothing after an error.

        Raises:
            OSError: it cannot be written.
        """
        if self._over or not self._pieces:
            self._pieces.clear()
            return
        try:
            self._pass_on()
        except OSError:
            self._over = True
            raise

    def _pass_on(self) -> None:
        raise NotImplementedError

    def hurry(self) -> None:
        """From now on nobody is waited for for long."""

    def close(self) -> None:
        """Nothing more comes."""


class GrowingFile(Growing):
    """A file that takes its name with its first fragment; until then an older one of the name stays.

    Where writing fails, it ends with its last whole fragment.

    Args:
        path: target.

    Raises:
        OSError: no file can be made there; later also, that it is not there any more under its name.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._whole = WholeFile(path, prefix=f".{path.stem[:40]}.", suffix=".part")
        try:
            self._file = open(self._whole.path, "wb", buffering=0)  # noqa: SIM115
        except BaseException:
            self._whole.abort()
            raise
        self._size = 0
        self._named = False

    def _pass_on(self) -> None:
        if self._named:
            self._check_there()
        file, whole = self._file.fileno(), self._size
        try:
            while self._pieces:
                data, at = memoryview(self._pieces[0]), self._size
                while data:
                    written = os.pwrite(file, data, at)
                    data, at = data[written:], at + written
                self._size += len(self._pieces.popleft())
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file, whole)
            raise
        if not self._named:
            self._named = True
            self._whole.finish()

    def _check_there(self) -> None:
        """Nobody would find what is written to a file without a name."""
        try:
            there = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._whole.target))
        except (FileNotFoundError, NotADirectoryError):
            there = False
        if not there:
            raise OSError("it was removed or replaced while it was being written")

    def close(self) -> None:
        """Nothing is left of a file that nothing was written to."""
        self._file.close()
        if not self._named:
            self._whole.abort()


class Pipe(Growing):
    """A pipe, such as standard output.

    Args:
        descriptor: open for writing; not closed here.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._hurried = descriptor, False

    def _pass_on(self) -> None:
        """Waits for the reader; OSError where it has gone, or where there is hurry and it does not read."""
        room = select.poll()
        room.register(self._descriptor, select.POLLOUT)
        read = time.monotonic()  # for the last time
        while self._pieces:
            view = memoryview(self._pieces[0])
            while view:
                if room.poll(POLL):  # then so much goes into it at once
                    self._over = True  # an interruption just here would hide how much went
                    view = view[os.write(self._descriptor, view[: select.PIPE_BUF]) :]
                    self._pieces[0] = bytes(view)
                    self._over, read = False, time.monotonic()
                elif self._hurried and time.monotonic() - read > PATIENCE:
                    raise TimeoutError("nobody reads it")
            self._pieces.popleft()

    def hurry(self) -> None:
        """From now on wait for a reader that does not read no longer than `PATIENCE`."""
        self._hurried = True
