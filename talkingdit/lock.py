# SPDX-License-Identifier: Apache-2.0
"""One run at a time: a file that says who is at work in a folder, locked for as long as that process lives.

The operating system holds the lock (`flock`) and gives it up when the process ends, however it ends, so that a file of
a run that was killed locks nothing and needs no guess about its age. The file itself says which process on which host
has it, for the sentence that another run gets. Processes of one torchrun share a lock. The `filelock` package locks in
the same way, but for one process at a time, and without a word about whose lock it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from talkingdit.errors import UserError

_PATIENCE = 2.0  # seconds for another process of the same run to write down that it is one
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """A lock that this process has until `release`, or until it ends.

    Args:
        file: the lock file, in a folder that is there; it goes away with the lock.
        place: what the sentence to another run calls what is locked.
        work: what is done there, for that sentence: "talkingdit generate".
        run: name of a run whose processes share the lock; "" for a process that is alone.
        patience: seconds to wait for another run that has it.

    Raises:
        UserError: another run has it, and keeps it.
        OSError: the file cannot be made.
    """

    def __init__(self, file: Path, place: object, work: str, run: str = "", patience: float = 0.0):
        self.file = file
        self._handle: int | None = None
        self._mine = {"host": socket.gethostname(), "process": os.getpid(), "work": work, "run": run}
        begun = time.monotonic()
        while (taken := self._try()) is not True:
            holder = _read(file)
            # Another process of this run may just be writing down that it is one, or have given the lock up.
            own = taken is None or bool(run and holder.get("run", run) == run)
            if time.monotonic() - begun > max(patience, _PATIENCE if own else 0.0):
                raise UserError(f"{place}: {_told(holder)} is at work there; wait for it, or end it first.")
            time.sleep(0.01)
        _held.add(self)

    def _try(self) -> bool | None:
        """Take the lock, or a part in that of the same run; False: another has it; None: it changes just now."""
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            run, first = self._mine["run"], _flock(handle, fcntl.LOCK_EX)
            if not first and not (run and _read(handle).get("run") == run and _flock(handle, fcntl.LOCK_SH)):
                return False
            if not _is(handle, self.file):  # its holder has just removed it
                return None
            if first:
                self._sign(handle)
                if run and not _flock(handle, fcntl.LOCK_SH):
                    return None
            self._handle, handle = handle, -1
            return True
        finally:
            if handle >= 0:
                os.close(handle)

    def _sign(self, handle: int) -> None:
        """Say who has the lock. A full disk leaves no file that says nothing."""
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(self._mine).encode() + b"\n", 0)
        except OSError:
            self.file.unlink(missing_ok=True)
            raise

    def release(self) -> None:
        """Give the lock up; the last of a run removes the file."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        with contextlib.suppress(OSError):
            if _flock(handle, fcntl.LOCK_EX) and _is(handle, self.file):
                self.file.unlink()
        os.close(handle)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()

    def _forget(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def lock_of(target: str | os.PathLike[str], work: str, patience: float = 0.0) -> RunLock:
    """A lock of one file, by whatever links it is reached; it lies beside the file, hidden.

    Args:
        target: the file, which need not be there.
        work, patience: see `RunLock`.

    Raises:
        UserError: another run has it, or the lock cannot be made.
    """
    real = Path(os.path.realpath(target))
    try:
        return RunLock(real.with_name(f".{real.name}.lock"), target, work, patience=patience)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}).") from error


@contextmanager
def alone(targets: Iterable[str | os.PathLike[str]], work: str) -> Iterator[None]:
    """No other run that asks writes these files until the block ends: for results of long work.

    Raises:
        UserError: another run is about to write one of them, or a lock cannot be made.
    """
    with contextlib.ExitStack() as held:
        for target in sorted(map(Path, targets)):
            held.enter_context(lock_of(target, work))
        yield


@contextmanager
def changing(target: str | os.PathLike[str], work: str) -> Iterator[None]:
    """One at a time: for a block that reads a file and writes it anew with something more in it. Others wait.

    Raises:
        UserError: another run takes longer than a minute, or the lock cannot be made.
    """
    with lock_of(target, work, patience=60.0):
        yield


def name_of_torchrun() -> str:
    """What all processes of one torchrun have in common, for `RunLock`; "" for a process that was started alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    return " ".join(os.environ.get(name, "-") for name in names)


def _flock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        holder = _read(handle)  # a file system without locks: by the process, as far as it can be seen from here
        mine = holder.get("host") == socket.gethostname() and holder.get("process") != os.getpid()
        return kind == fcntl.LOCK_SH or not (mine and _lives(holder.get("process")))
    return True


def _lives(process: object) -> bool:
    try:
        os.kill(int(process), 0)  # type: ignore[call-overload]
    except PermissionError:
        return True
    except (OSError, ValueError, TypeError, OverflowError):
        return False
    return True


def _is(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(file))
    except FileNotFoundError:
        return False


def _read(source: Path | int) -> dict[str, Any]:
    """What the holder says of itself; {} where it has not said it yet, or somebody else wrote the file."""
    try:
        if isinstance(source, Path):
            with source.open("rb") as stream:
                text = stream.read(4096)
        else:
            text = os.pread(source, 4096, 0)
        found = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _told(holder: dict[str, Any]) -> str:
    if not holder:
        return "another run"
    return f"another run ({holder.get('work')}, process {holder.get('process')} on {holder.get('host')})"


def _forget_all() -> None:
    """A forked child must not keep a lock of its parent, which it could outlive."""
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_forget_all)
