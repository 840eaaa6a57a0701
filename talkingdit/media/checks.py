# SPDX-License-Identifier: Apache-2.0
"""What a user may hand over as a file, checked before any work; every complaint is a `UserError` of one sentence."""

from __future__ import annotations

import hashlib
import os
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
    if os.path.isdir(source):
        raise UserError(f"{what} {str(source)!r}: expected a file, got a folder")
    if os.path.islink(source) and not os.path.exists(source):
        raise UserError(f"{what} {str(source)!r}: expected an existing file, got a link that leads to none")
    if os.path.exists(source) and not os.path.isfile(source):
        kind = "a pipe" if source.is_fifo() else "something else"
        raise UserError(f"{what} {str(source)!r}: expected a file that can be read twice, got {kind}; save it first")
    if not os.path.isfile(source):
        raise UserError(f"{what} {str(source)!r}: expected an existing file, got none of this name")
    if not os.access(source, os.R_OK):
        raise UserError(f"{what} {str(source)!r}: expected a readable file, got one without permission to read")
    if source.stat().st_size == 0:
        raise UserError(f"{what} {str(source)!r}: expected {what} data, got an empty file")
    return source


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal.

    Raises:
        UserError: it cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({reason_of(error)}).") from None
    return found.hexdigest()


def reason_of(error: BaseException) -> str:
    """What an error of a library says, in one line without a full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0].rstrip(".")
