# SPDX-License-Identifier: Apache-2.0
"""Where results go, checked before any work: they can be written, under this name, and over nothing that is read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from talkingdit.errors import UserError
from talkingdit.media.checks import reason_of

ADDED = 16  # bytes that names of ours beside a result are longer: its folder of finished clips, its lock


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Make sure, before any long work, that a file can be written at `path`; leaves nothing behind.

    Returns:
        The path. An existing file there is not touched.

    Raises:
        UserError: the folder does not exist or does not let files be made, the name is too long, or `path` is a folder
            or a device.
    """
    target = Path(path)
    name = str(target)
    if "\0" in name:
        raise UserError(f"output {name!r}: expected the name of a file, got one with a NUL in it")
    if os.path.isdir(target):
        raise UserError(f"output {name!r}: expected the name of a file, got a folder")
    folder = target.parent
    if not os.path.isdir(folder):
        raise UserError(f"output {name!r}: expected an existing folder, got {str(folder)!r}, which is none")
    _check_length(target)
    if os.path.exists(target) and not os.path.isfile(target):
        raise UserError(f"output {name!r}: expected the name of a file, got something that is none")
    # Where a link leads is where files are made.
    real = Path(os.path.realpath(target)).parent
    try:
        with tempfile.TemporaryFile(dir=real):  # without a name, where the system can: a kill leaves nothing
            pass
    except OSError as error:
        got = f"{str(real)!r} ({reason_of(error)})"
        raise UserError(f"output {name!r}: expected a folder that can be written to, got {got}") from None
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise UserError(f"output {name!r}: expected a file that may be replaced, got a write-protected one")
    return target


def _check_length(target: Path) -> None:
    try:
        most = os.pathconf(target.parent, "PC_NAME_MAX") - ADDED
    except (OSError, ValueError):
        most = 255 - ADDED
    length = len(os.fsencode(target.name))
    if length > most:
        shown = f"{target.name[:40]}..."
        raise UserError(f"output {shown!r}: expected a name of at most {most} bytes, got one of {length}")


def check_apart(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Make sure that nothing is written over what is read, nor two results into one file.

    Files are the same through symbolic and hard links as well; a link to a file in a folder is that folder. Nothing is
    opened.

    Args:
        outputs, inputs: files by what a person calls them; None for those that are not given. Folders may be inputs.

    Raises:
        UserError: two are the same.
    """
    written = {name: path for name, path in outputs.items() if path is not None}
    for name, path in written.items():
        for other, source in inputs.items():
            if source is not None and _same(path, source):
                raise UserError(f"{name} {str(path)!r}: expected a file of its own, got the one given as {other}")
    names = list(written)
    for number, name in enumerate(names):
        for other in names[:number]:
            if _same(written[name], written[other]):
                raise UserError(
                    f"{name} {str(written[name])!r}: expected a file of its own, got the one given as {other}"
                )


def check_folder(folder: Path, names: Sequence[str], mark: str, inputs: Mapping[str, Path | None]) -> None:
    """Make sure that results take the place of earlier results alone, and of nothing that is read.

    Args:
        folder: of the results; it may not be there yet.
        names: of the results.
        mark: what each run leaves in the folder; where it is missing, files of these names are somebody else's.
        inputs: files by what a person calls them; None for those that are not given.

    Raises:
        UserError: a result would be written over something else.
    """
    check_apart({name: folder / name for name in names}, inputs)
    foreign = [] if os.path.lexists(folder / mark) else [name for name in names if os.path.lexists(folder / name)]
    if foreign:
        raise UserError(
            f"output {str(folder)!r}: expected a new folder or one of earlier results, got one with a {foreign[0]} of "
            "another origin, which would be lost"
        )


def _same(one: Path, other: Path) -> bool:
    if os.path.islink(one) and os.path.isdir(other) and os.path.exists(one):
        inside = os.path.commonpath([os.path.realpath(one), os.path.realpath(other)]) == os.path.realpath(other)
        if inside:
            return True
    try:
        if os.path.samefile(one, other):
            return True
    except (OSError, ValueError):
        pass  # one of them is not there
    return os.path.realpath(one) == os.path.realpath(other)
