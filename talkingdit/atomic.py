# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part-"  # how names of what is not complete yet begin


class WholeFile:
    """A file that has a temporary name beside its target until it is finished.

    For what is written over a longer time; `whole_file` does for a block of code. A target that is a link stays one:
    the file it points to is replaced. The result has the mode that any new file gets.

    Args:
        target: the file to make or replace.
        prefix: of the temporary name, by which leftovers of a killed process are found.
        suffix: of the temporary name; default: that of the target, for libraries that go by it.

    Raises:
        OSError: no file can be made beside the target.
    """

    def __init__(self, target: str | os.PathLike[str], prefix: str = PART, suffix: str | None = None):
        self.target = Path(os.path.realpath(target))
        ending = self.target.suffix if suffix is None else suffix
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=ending, dir=self.target.parent)
        os.close(handle)
        self.path = Path(name)
        """The temporary file; a library may replace it."""

    def finish(self, sync: bool = False) -> None:
        """Give the file its name; where that fails the target stays what it was, and nothing is left behind.

        Args:
            sync: have it on the disk before it takes its name.

        Raises:
            OSError: the disk is full, or the target cannot be replaced.
        """
        try:
            os.chmod(self.path, _mode())  # mkstemp makes private files
            if sync:
                _sync(self.path)
            os.replace(self.path, self.target)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove what was written; the target stays what it was. Nothing happens where it is finished."""
        self.path.unlink(missing_ok=True)


@contextmanager
def whole_file(
    target: str | os.PathLike[str], prefix: str = PART, sync: bool = False, suffix: str | None = None
) -> Iterator[Path]:
    """A temporary file beside the target, which takes its name when the block ends, and goes away if it raises.

    Args:
        target, prefix, suffix: see `WholeFile`.
        sync: have it on the disk before it takes its name.

    Yields:
        The temporary file; a library may replace it.
    """
    file = WholeFile(target, prefix, suffix)
    try:
        yield file.path
    except BaseException:
        file.abort()
        raise
    file.finish(sync)


def write_whole(target: str | os.PathLike[str], data: bytes, prefix: str = PART, sync: bool = False) -> None:
    """Write a file that is there as a whole or not at all; a target that is a link stays one."""
    with whole_file(target, prefix, sync) as temporary:
        temporary.write_bytes(data)


def append_line(file: str | os.PathLike[str], line: str) -> None:
    """Add a line to a file, whole or not at all, also where several processes do. A link is not followed.

    What a killed process or a full disk has cut off before becomes a line of its own.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):  # file systems without locks: a line is one write, which others do not cut
            fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        cut = size and os.pread(handle, 1, size - 1) != b"\n"
        data = b"\n" * bool(cut) + line.encode() + b"\n"
        try:
            while data:
                data = data[os.write(handle, data) :]
        except BaseException:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


@contextmanager
def whole_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside the target, which takes its place when the block ends, and goes away if it raises.

    It is called as the target with ".tmp" behind. A folder that it replaces is away only between two renames; a process
    that is killed between them leaves it under the name of the target with ".old" behind.
    """
    path = Path(os.path.realpath(target))
    temporary, old = (path.with_name(path.name + ending) for ending in (".tmp", ".old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if old.is_dir() and not path.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _mode() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
