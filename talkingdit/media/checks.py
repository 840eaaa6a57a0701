# SPDX-License-Identifier: Apache-2.0
"""What a user may hand over as a file, checked before any work; every complaint is a `UserError` of one sentence."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from talkingdit.errors import UserError


def existing_file(path: str | os.PathLike[str], what: str) -> Path:
    """A file that can be read and is not empty.

    Args:
        what: "audio", "image", ...: how messages call it.

    Raises:
        UserError: it is none.
    """
    source = Path(path)
    if source.is_dir():
        raise UserError(f"{what} {str(source)!r}: expected a file, got a folder")
    if not source.is_file():
        raise UserError(f"{what} {str(source)!r}: expected an existing file, got none of this name")
    if not os.access(source, os.R_OK):
        raise UserError(f"{what} {str(source)!r}: expected a readable file, got one without permission to read")
    if source.stat().st_size == 0:
        raise UserError(f"{what} {str(source)!r}: expected {what} data, got an empty file")
    return source


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Make sure, before any long work, that a file can be written at `path`; leaves nothing behind.

    Returns:
        The path. An existing file there is not touched.

    Raises:
        UserError: the folder does not exist or does not let files be made, or `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"output {str(target)!r}: expected the name of a file, got a folder")
    folder = target.parent
    if not folder.is_dir():
        raise UserError(f"output {str(target)!r}: expected an existing folder, got {str(folder)!r}, which is none")
    try:
        handle, probe = tempfile.mkstemp(prefix=f".{target.name[:40]}.", dir=folder)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        got = f"{str(folder)!r} ({reason_of(error)})"
        raise UserError(f"output {str(target)!r}: expected a folder that can be written to, got {got}") from None
    if target.exists() and not os.access(target, os.W_OK):
        raise UserError(f"output {str(target)!r}: expected a file that may be replaced, got a write-protected one")
    return target


def reason_of(error: BaseException) -> str:
    """What an error of a library says, in one line without a full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0].rstrip(".")
