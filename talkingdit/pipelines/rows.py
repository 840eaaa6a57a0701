# SPDX-License-Identifier: Apache-2.0
"""Numbers that are too many for memory: written to a file without a name, and read where they are wanted."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.errors import UserError
from talkingdit.media.checks import reason_of


class Rows:
    """Rows of one shape, float32, on the disk of a folder. Slices of them are read; none stays in memory.

    The file has no name: its room is free again when the process ends, however it does, and nobody finds it. Where the
    object is copied to another process, as `GenerationRequest` is, the copy knows how many rows there are and has none.

    Args:
        folder: on whose disk the file lies. Not that for temporary files, which may be in memory.
        shape: of a row; () for a single number.

    Raises:
        UserError: no file can be made there.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...] = ()):
        self._folder, self._row = folder, shape
        self._count = 0
        self._size = 4 * math.prod(shape)
        try:
            self._file: IO[bytes] | None = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{folder}: expected a folder that can be written to, got {reason_of(error)}.") from error

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._count, *self._row)

    @property
    def dtype(self) -> np.dtype[np.float32]:
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return self._count

    def append(self, rows: NDArray[np.float32]) -> None:
        """Add rows [n, *shape] behind the others.

        Raises:
            UserError: the disk is full.
        """
        if rows.shape[1:] != self._row or rows.dtype != np.float32:
            raise ValueError(f"Rows: rows must be float32 [n, {self._row}], got {rows.dtype} of shape {rows.shape}")
        data = np.ascontiguousarray(rows).data.cast("B") if rows.size else memoryview(b"")
        at = self._count * self._size
        try:
            while data:
                written = os.pwrite(self._descriptor, data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise UserError(
                f"{self._folder}: what a long voice is made into does not fit there ({reason_of(error)})."
            ) from error
        self._count += len(rows)

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        """Rows of a slice without steps, a new array."""
        begin, end, step = part.indices(self._count)
        if step != 1:
            raise ValueError(f"Rows: slices must have no steps, got {part}")
        found = np.empty((max(end - begin, 0), *self._row), np.float32)
        data = found.data.cast("B") if found.size else memoryview(b"")
        at = begin * self._size
        while data:
            count = os.preadv(self._descriptor, [data], at)
            if not count:
                raise OSError(f"{self._folder}: a temporary file has lost its end")
            data, at = data[count:], at + count
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or np.float32, copy=False)

    @property
    def _descriptor(self) -> int:
        if self._file is None:
            raise RuntimeError("Rows: the process that made them has them")
        return self._file.fileno()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}
