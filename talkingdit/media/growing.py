# SPDX-License-Identifier: Apache-2.0
"""Where a video goes that is watched while it is made: fragments of an MP4, to a file or into a pipe.

What was written at any moment plays: an index in front without times, and after it fragments with theirs. So a process
that is killed, a disk that is full and a reader that goes away leave a video of what was done.
"""

from __future__ import annotations

import os
from pathlib import Path

from talkingdit.atomic import WholeFile

FRAGMENT = 200_000  # microseconds of video in a fragment
# The index waits for the first fragment, as it says how much of the sound is the encoder's lead.
OPTIONS = {
    "movflags": "+delay_moov+default_base_moof",
    "frag_duration": str(FRAGMENT),
    "flush_packets": "1",  # nothing stays in a buffer between the muxer and the target
}


class GrowingFile:
    """A file that takes its name with its first bytes; until then an older one of the name stays.

    Args:
        path: target.

    Raises:
        OSError: no file can be made there.
    """

    def __init__(self, path: Path) -> None:
        self._whole = WholeFile(path, prefix=f".{path.stem[:40]}.", suffix=".part")
        try:
            self._file = open(self._whole.path, "wb", buffering=0)  # noqa: SIM115
        except BaseException:
            self._whole.abort()
            raise
        self._named = False

    def write(self, data: bytes) -> int:
        """Append bytes; they can be read at once."""
        _write_all(self._file.fileno(), data)
        if not self._named:
            self._named = True
            self._whole.finish()
        return len(data)

    def close(self) -> None:
        """Nothing is left of a file that nothing was written to."""
        self._file.close()
        if not self._named:
            self._whole.abort()


class Pipe:
    """A pipe, such as standard output.

    Args:
        descriptor: open for writing; not closed here.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes) -> int:
        """Pass bytes on; waits for the reader."""
        _write_all(self._descriptor, data)
        return len(data)

    def close(self) -> None:
        """The descriptor stays open."""


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]
