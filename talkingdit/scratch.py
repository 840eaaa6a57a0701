# SPDX-License-Identifier: Apache-2.0
"""Folders for large files of a run, that go with it: at its end, or with the next run if it was killed.

Its process keeps it locked (`flock`), which the operating system gives up however a process ends; a folder that nobody
has locked is one of a run that is no more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX, _HELD = "talkingdit-", ".held"
_LARGE = Path("/var/tmp")


class ScratchFolder:
    """A new folder.

    Args:
        place: where; None is where large files may be, that for temporary files may be in memory.

    Attributes:
        name: its path.
    """

    def __init__(self, place: Path | None = None) -> None:
        if place is None:
            place = _LARGE if _LARGE.is_dir() else Path(tempfile.gettempdir())
        _sweep(place)
        self._folder = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place)
        self.name = self._folder.name
        self._lock = _Directory(self.name)  # open as long as this object lives
        with contextlib.suppress(OSError):  # a file system without locks: then none is swept there
            fcntl.flock(self._lock.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Path(self.name, _HELD).touch()  # only what was locked is swept

    def cleanup(self) -> None:
        """Remove the folder and what is in it."""
        self._folder.cleanup()
        self._lock.close()


class _Directory:
    """A folder, opened."""

    def __init__(self, path: str | Path) -> None:
        self.handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def close(self) -> None:
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)

    __del__ = close


def _sweep(place: Path) -> None:
    """Remove folders of this user's runs that were killed."""
    for held in place.glob(f"{_PREFIX}*/{_HELD}"):
        with contextlib.suppress(OSError), contextlib.closing(_Directory(held.parent)) as folder:
            if os.fstat(folder.handle).st_uid == os.getuid():
                fcntl.flock(folder.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(held.parent, ignore_errors=True)
