# SPDX-License-Identifier: Apache-2.0
"""Folders for large files of a run, that go with it: at its end, or with the next run if it was killed.

Each has a file that its process keeps locked (`flock`), which the operating system gives up however a process ends; a
folder whose file nobody has locked is one of a run that is no more.
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
        # The file gets its name when it is locked, or another run would take the folder for one that was left.
        new = Path(self.name, _HELD + ".new")
        self._lock = new.open("w")  # open as long as this object lives
        with contextlib.suppress(OSError):  # a file system without locks: then none is swept there
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new.rename(Path(self.name, _HELD))

    def cleanup(self) -> None:
        """Remove the folder and what is in it."""
        self._folder.cleanup()
        self._lock.close()


def _sweep(place: Path) -> None:
    """Remove folders of this user's runs that were killed."""
    for held in place.glob(f"{_PREFIX}*/{_HELD}"):
        with contextlib.suppress(OSError):
            lock = os.open(held, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(lock).st_uid != os.getuid():
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not held.parent.is_symlink():
                    shutil.rmtree(held.parent, ignore_errors=True)
            finally:
                os.close(lock)
