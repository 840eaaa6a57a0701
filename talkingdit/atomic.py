# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there as a whole or not at all.

What is not complete yet lies beside its target under a temporary name, which tells by a digest whose it is, and is
locked by the process that writes it. What a killed process leaves is locked by nobody, and the next one that writes the
same target removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part-"  # how names of what is not complete yet begin
AWAY = ".away-"  # and of what is about to be replaced
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")  # a part of a model


class WholeFile:
    """A file that has a temporary name beside its target until it is finished.

    For what is written over a longer time; `whole_file` does for a block of code. A target that is a link stays one:
    the file it points to is replaced. The result has the mode that any new file gets. What killed processes left of the
    same target, with the same prefix, is removed.

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
        mark = _mark(self.target, prefix)
        remove_left(self.target.parent, mark)
        self.path, self._handle = _new_file(self.target.parent, mark, ending)
        """The temporary file; a library may replace it."""
        self._mode = os.fstat(self._handle).st_mode & 0o777

    def finish(self, sync: bool = False) -> None:
        """Give the file its name; where that fails the target stays what it was, and nothing is left behind.

        Args:
            sync: have it on the disk before it takes its name.

        Raises:
            OSError: the disk is full, or the target cannot be replaced.
        """
        try:
            os.chmod(self.path, self._mode)  # a library that replaced it may have made it private
            if sync:
                sync_to_disk(self.path)
            os.replace(self.path, self.target)
        except BaseException:
            self.abort()
            raise
        self._release()

    def abort(self) -> None:
        """Remove what was written; the target stays what it was. Nothing happens where it is finished.

        Raises nothing: what has gone wrong before is told, and the next run of the target removes what is left.
        """
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._release()

    def _release(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


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
        with contextlib.suppress(OSError):  # file systems without locks: a line is one write, which others do not cut
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
def part_folder(target: str | os.PathLike[str], prefix: str = PART) -> Iterator[Path]:
    """A private folder beside the target for libraries that leave files of their own; it goes when the block ends.

    What killed processes left of the same target is removed first. Finished files are taken out by `take`.

    Raises:
        OSError: no folder can be made beside the target.
    """
    path = Path(os.path.realpath(target))
    mark = _mark(path, prefix)
    remove_left(path.parent, mark)
    folder, handle = _new_folder(path.parent, mark)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def take(file: Path, target: str | os.PathLike[str], sync: bool = False) -> None:
    """Give a finished file of a `part_folder` its name. A target that is a link stays one.

    Raises:
        OSError: the target cannot be replaced.
    """
    os.chmod(file, 0o666 & ~_umask())
    if sync:
        sync_to_disk(file)
    os.replace(file, os.path.realpath(target))


@contextmanager
def whole_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside the target, which takes its place when the block ends, and goes away if it raises.

    A folder that it replaces is away only between two renames; a process that is killed between them leaves it under a
    temporary name, and the next one puts it back. Only what the new folder has again is replaced: entries of the same
    names, and parts of a model that was cut into other parts. Files get the mode that any new file gets.

    Raises:
        FileExistsError: there is a folder already, and something else in it, which would be lost. It is left alone.
        OSError: no folder can be made beside the target.
    """
    path = Path(os.path.realpath(target))
    path.parent.mkdir(parents=True, exist_ok=True)
    new, away = _mark(path, PART), _mark(path, AWAY)
    _put_back(path, away)
    remove_left(path.parent, new)
    temporary, handle = _new_folder(path.parent, new)
    try:
        yield temporary
        give_usual_modes(temporary)
        temporary.chmod(0o777 & ~_umask())
        old = _move_away(path, away, temporary)
        try:
            temporary.rename(path)
        except BaseException:
            if old is not None:
                old.rename(path)
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def put_in_place(folder: Path, target: Path) -> None:
    """Give a finished folder its name, under which there is none; both outlive a crash of the machine.

    For folders that several processes fill, under a name that all of them know; the files in it are on the disk.

    Raises:
        OSError: there is a folder of that name already, with something in it.
    """
    sync_to_disk(folder)
    folder.rename(target)
    sync_to_disk(target.parent)


def remove_whole(folder: Path, suffix: str) -> None:
    """Remove a folder that must not be seen in part: it gets another name first, by a suffix.

    Raises:
        OSError: it cannot be renamed or removed.
    """
    shutil.rmtree(folder.rename(folder.with_name(folder.name + suffix)))


def _put_back(path: Path, away: str) -> None:
    """What killed processes had moved away: it is the target again where there is none, and goes where there is."""
    for left in sorted(entry for entry in path.parent.iterdir() if entry.name.startswith(away)):
        if os.path.lexists(path):
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(path)


def _move_away(path: Path, away: str, new: Path) -> Path | None:
    """Give a folder that another replaces a temporary name; None where there is none."""
    if not path.is_dir():
        return None
    lost = sorted(name for name in _files(path) - _files(new) if not SHARD.search(name))
    if lost:
        raise FileExistsError(errno.EEXIST, f"it is there already and holds {lost[0]!r}, which would be lost")
    old = path.with_name(away + secrets.token_hex(4))
    path.rename(old)
    return old


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def give_usual_modes(folder: Path) -> None:
    """Give the files of a folder the mode that any new file gets: safetensors makes private ones."""
    mode = 0o666 & ~_umask()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode | path.stat().st_mode & 0o111)


def remove_left(folder: Path, prefix: str = PART) -> None:
    """Remove files and folders whose names begin with a prefix, and that no living process is writing."""
    try:
        left = [path for path in folder.iterdir() if path.name.startswith(prefix)]
    except OSError:
        return  # what uses the folder says what is wrong with it
    for path in left:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


# ---- Names and locks -------------------------------------------------------------------------------------------------


def _mark(target: Path, prefix: str) -> str:
    """How the temporary names of a target begin."""
    return f"{prefix}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]}-"


def _new_file(folder: Path, mark: str, suffix: str) -> tuple[Path, int]:
    while True:
        path = folder / f"{mark}{secrets.token_hex(4)}{suffix}"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        if _held(path, handle):
            return path, handle
        os.close(handle)


def _new_folder(folder: Path, mark: str) -> tuple[Path, int]:
    while True:
        path = folder / f"{mark}{secrets.token_hex(4)}"
        try:
            path.mkdir(0o700)
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileExistsError, FileNotFoundError):
            if not folder.is_dir():
                raise
            continue
        if _held(path, handle):
            return path, handle
        os.close(handle)


def _held(path: Path, handle: int) -> bool:
    """Lock what was just made; False where another process found it before, took it for a leftover and removes it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nobody removes leftovers there
    return os.path.lexists(path)


def _umask() -> int:
    try:
        with open("/proc/self/status", encoding="utf-8") as status:  # asking the system call would change it
            return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
    except (OSError, StopIteration, ValueError):
        umask = os.umask(0)
        os.umask(umask)
        return umask


def sync_to_disk(path: Path) -> None:
    """Make a file, or the names in a folder, outlive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
