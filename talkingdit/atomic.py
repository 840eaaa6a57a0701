# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part-"  # how names of what is not complete yet begin


@contextmanager
def whole_file(target: str | os.PathLike[str], prefix: str = PART, sync: bool = False) -> Iterator[Path]:
    """A temporary file beside the target, which takes its name when the block ends, and goes away if it raises.

    A target that is a link stays one: the file it points to is replaced. The result has the mode that any new file
    gets.

    Args:
        target: the file to make or replace.
        prefix: of the temporary name, by which leftovers of a killed process are found.
        sync: have it on the disk before it takes its name.

    Yields:
        The temporary file, of the target's suffix; a library may replace it.
    """
    path = Path(os.path.realpath(target))
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, _mode())
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside the target, which takes its place when the block ends, and goes away if it raises."""
    path = Path(target)
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_whole(target: str | os.PathLike[str], data: bytes, prefix: str = PART, sync: bool = False) -> None:
    """Write a file that is there as a whole or not at all."""
    with whole_file(target, prefix, sync) as temporary:
        temporary.write_bytes(data)


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
