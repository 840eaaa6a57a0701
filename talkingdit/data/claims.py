# SPDX-License-Identifier: Apache-2.0
"""Which entry a worker is at, on the disk: what a decoder that takes its whole process with it was reading.

An exception costs one clip; a library that crashes costs the process, and at the same entry the next one, too. So a
worker writes down what it begins, and an entry at which processes ended `TRIES` times is left out.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from talkingdit.atomic import PART, write_whole
from talkingdit.errors import UserError

TRIES = 2  # processes that may end at an entry
_END = "now"

# What reading a file of ours may raise that somebody has changed.
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)


class Claims:
    """The claims in a folder, as they were before this worker began.

    Args:
        folder: of the shards.
        prefix: of this worker's unfinished files.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._file = folder / f"{prefix}{_END}"
        self._prefix = prefix
        self._ended: dict[str, int] = {}
        for path in folder.glob(f"{PART}*{_END}"):
            with contextlib.suppress(
                OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError
            ):
                said = json.loads(path.read_text())
                self._ended[str(said["key"])] = max(int(said["tries"]), self._ended.get(str(said["key"]), 0))

    def tries(self, key: str) -> int:
        """How many processes ended at an entry."""
        return self._ended.get(key, 0)

    def begin(self, key: str) -> None:
        """Write down that this worker reads an entry now."""
        try:
            write_whole(self._file, json.dumps({"key": key, "tries": self.tries(key) + 1}).encode(), self._prefix)
        except OSError as error:
            raise UserError(f"{self._file.parent}: cannot be written ({error.strerror or error}).") from error

    def end(self) -> None:
        """It is done with it, whatever came of it."""
        self._file.unlink(missing_ok=True)
