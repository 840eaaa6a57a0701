# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: rank 0 has the lock, and all ranks get the same sentence where another run has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from talkingdit.distributed.team import from_rank_0
from talkingdit.errors import UserError
from talkingdit.lock import RunLock, lock_of


@contextmanager
def one_run(folder: Path, work: str) -> Iterator[None]:
    """Nobody else works in this folder, which is made if need be, until the block ends. Every rank calls it.

    Args:
        work: what another run is told is done there.

    Raises:
        UserError: on all ranks: another run is at work there, or the folder cannot be used.
    """
    held: list[RunLock] = []

    def take() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.append(RunLock(folder / ".lock", folder, work))
        except OSError as error:
            raise UserError(f"{folder}: cannot be used ({error.strerror or error}).") from error

    from_rank_0(take)
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def written(target: Path, write: Callable[[], None], work: str) -> None:
    """Rank 0 writes a file or folder, and nobody else does at the same time; all wait for it. Every rank calls it.

    Raises:
        UserError: on all ranks: another run writes it, or it cannot be written.
    """

    def alone() -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with lock_of(target, work):
                write()
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
            raise UserError(f"{target}: cannot be written ({reason}).") from error

    from_rank_0(alone)
