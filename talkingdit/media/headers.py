# SPDX-License-Identifier: Apache-2.0
"""Headers of sound files that FFmpeg would take at their word, or refuse, mended while they are read.

A file that was written to a pipe states no sizes (WAV, RF64, W64, AIFF), some programs leave out the byte that follows
a chunk of odd length, and of samples of 24 bits in 32 FFmpeg makes floats. The file itself stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

FULL = 2**32 - 1  # a size that did not fit, or was never known
PCM, EXTENSIBLE = 1, 0xFFFE  # kinds of samples in a WAV
W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # of the names of all chunks but the first
W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
CHUNKS = 1000  # looked at before the sound; more have no WAV and AIFF of any program


class Unfilled(ValueError):
    """There are zeros where the parts of a file should be."""


@dataclass(frozen=True)
class HeaderEdit:
    """Other bytes in the place of some of a file.

    Args:
        at: the first of them.
        size: how many are left out.
        data: that stand there instead.
    """

    at: int
    size: int
    data: bytes


class Mended:
    """A file with edits, for a library that reads from Python's files.

    Args:
        file: open for reading.
        edits: ascending, apart from each other.
    """

    def __init__(self, file: IO[bytes], edits: Sequence[HeaderEdit]) -> None:
        self.name = getattr(file, "name", "")
        self._file, self._at = file, 0
        self._parts: list[tuple[int, bytes | int]] = []  # where each part ends, and its bytes, or its shift in the file
        end = before = 0
        for edit in (*edits, HeaderEdit(file.seek(0, os.SEEK_END), 0, b"")):
            self._parts.append((end + edit.at - before, before - end))
            end += edit.at - before
            if edit.data:
                self._parts.append((end + len(edit.data), edit.data))
            end += len(edit.data)
            before = edit.at + edit.size
        self._size = end

    def read(self, size: int = -1) -> bytes:
        """Up to so many bytes; none at the end."""
        stop = self._size if size < 0 else min(self._at + size, self._size)
        found, begin = [], 0
        for end, what in self._parts:
            low, high = max(begin, self._at), min(end, stop)
            if low < high:
                if isinstance(what, bytes):
                    found.append(what[low - begin : high - begin])
                else:
                    self._file.seek(low + what)
                    found.append(self._file.read(high - low))
            begin = end
        self._at = max(self._at, stop)
        return b"".join(found)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at


def mended(file: IO[bytes]) -> tuple[Any, dict[str, str]]:
    """A sound file as it is to be read: itself or a `Mended`, and options of FFmpeg's demuxer.

    Args:
        file: open for reading; it is left at its beginning.

    Raises:
        Unfilled: as its name says.
    """
    try:
        head = file.read(40)
        if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
            edits, options = _wave(file, head[:4] != b"RIFF")
        elif head[:16] == W64_RIFF and head[28:40] == W64_TAIL:
            edits, options = _w64(file), {}
        elif head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
            edits, options = _aiff(file), {}
        else:
            return file, {}
        return (Mended(file, edits) if edits else file), options
    finally:
        file.seek(0)


# ---- WAV -------------------------------------------------------------------------------------------------------------


def _wave(file: IO[bytes], large: bool) -> tuple[list[HeaderEdit], dict[str, str]]:
    """Of a WAV, or RF64 (large), whose data goes on behind its stated end, all is read."""
    end = file.seek(0, os.SEEK_END)
    edits: list[HeaderEdit] = []
    stated, at = 0, 12
    for _ in range(CHUNKS):
        chunk = _read(file, at, 8)
        if chunk == bytes(8):
            raise Unfilled("a WAV that is not filled in")  # FFmpeg would look at every eight zeros of gigabytes
        if len(chunk) < 8 or not _is_name(chunk[:4]):
            return edits, {}
        name, size = chunk[:4], int.from_bytes(chunk[4:], "little")
        at += 8
        if name == b"ds64":
            stated = int.from_bytes(_read(file, at + 8, 8), "little")
        elif name == b"fmt ":
            edits += _filled_samples(_read(file, at, size if size < 100 else 100), at)
        elif name == b"data":
            size = stated if large and size == FULL else size
            at += size
            follows = _read(file, at + size % 2, 8)
            known = len(follows) == 8 and _is_name(follows[:4])
            fits = known and at + size % 2 + 8 + int.from_bytes(follows[4:], "little") <= end
            return edits, {} if at + 8 >= end or fits else {"ignore_length": "1"}
        at += size
        if size % 2 and _is_name(_read(file, at, 4)) and not _is_name(_read(file, at + 1, 4)):
            edits.append(HeaderEdit(at, 0, b"\0"))  # somebody has left it out
        else:
            at += size % 2
    return edits, {}


def _filled_samples(form: bytes, at: int) -> list[HeaderEdit]:
    """Where samples have fewer bits than their place, they fill it from above, and may be read as if they had all."""
    bits, valid = int.from_bytes(form[14:16], "little"), int.from_bytes(form[18:20], "little")
    kinds = [int.from_bytes(form[part], "little") for part in (slice(0, 2), slice(24, 26))]
    if kinds == [EXTENSIBLE, PCM] and 0 < valid < bits and bits % 8 == 0:
        return [HeaderEdit(at + 18, 2, bits.to_bytes(2, "little"))]
    return []


def _is_name(chunk: bytes) -> bool:
    return len(chunk) == 4 and all(32 <= byte < 127 for byte in chunk)


def _read(file: IO[bytes], at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


# ---- W64 and AIFF ----------------------------------------------------------------------------------------------------


def _w64(file: IO[bytes]) -> list[HeaderEdit]:
    """Sizes of a W64 that was written to a pipe, or was cut."""
    end = file.seek(0, os.SEEK_END)
    edits = []
    if int.from_bytes(_read(file, 16, 8), "little") < 40:
        edits.append(HeaderEdit(16, 8, end.to_bytes(8, "little")))
    at = 40
    for _ in range(CHUNKS):
        chunk = _read(file, at, 24)
        size = int.from_bytes(chunk[16:], "little")
        if len(chunk) < 24 or chunk[4:16] != W64_TAIL:
            break
        if chunk[:4] == b"data":
            after = at + size + -size % 8
            if size <= 24 or (after < end and _read(file, after + 4, 12) != W64_TAIL) or after > end + 8:
                edits.append(HeaderEdit(at + 16, 8, (end - at).to_bytes(8, "little")))
            break
        if size < 24:
            break
        at += size + -size % 8
    return edits


def _aiff(file: IO[bytes]) -> list[HeaderEdit]:
    """Sizes of an AIFF that was written to a pipe, or was cut."""
    end = file.seek(0, os.SEEK_END)
    edits: list[HeaderEdit] = []
    at = 12
    for _ in range(CHUNKS):
        chunk = _read(file, at, 8)
        size = int.from_bytes(chunk[4:], "big")
        if len(chunk) < 8 or not _is_name(chunk[:4]):
            break
        at += 8
        if chunk[:4] == b"SSND":
            after = at + size + size % 2
            if size <= 8 or after > end + 1 or (after + 8 <= end and not _is_name(_read(file, after, 4))):
                edits = [HeaderEdit(place, 4, min(end - place - 4, FULL).to_bytes(4, "big")) for place in (4, at - 4)]
            break
        at += size + size % 2
    return edits
