# SPDX-License-Identifier: Apache-2.0
"""Records of videos, a line each in `figures.jsonl`, written by one process: what is in it is done.

A line is there as a whole or not at all (`append_line`). The last one of a video counts, if the file is still the one
that was watched and the settings are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from talkingdit.atomic import append_line
from talkingdit.curate.measure import FORM, Record, Video, stamp_of
from talkingdit.curate.settings import Watch

FIGURES = "figures.jsonl"


class Log:
    """The records of a folder.

    Args:
        folder: of the results.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FIGURES
        self._known: dict[str, str] = {}  # last line of each video; parsed when it is needed
        if self.file.is_file():
            with self.file.open("rb") as lines:
                for line in lines:
                    self._remember(line)

    def _remember(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            if record["form"] == FORM:
                self._known[record["key"]] = line.decode()
        except (ValueError, KeyError, TypeError):
            return  # cut off by a kill, or of another version: the video is watched again

    def add(self, record: Record) -> None:
        """Note a video; raises OSError where there is no place."""
        line = json.dumps(record, allow_nan=False)
        append_line(self.file, line)
        self._known[record["key"]] = line

    def missing(self, videos: Iterable[Video], watch: Watch, again: bool = False) -> list[Video]:
        """The videos that are still to be watched.

        Args:
            videos: all of them.
            watch: settings.
            again: broken ones too.
        """
        digest = watch.digest()
        left = []
        for video in videos:
            line = self._known.get(video.key)
            record = {} if line is None else json.loads(line)
            same = record.get("watch") == digest and all(
                record.get(name) == value for name, value in stamp_of(video).items()
            )
            if not same or (again and record["error"]):
                left.append(video)
        return left

    def records(self, videos: Iterable[Video]) -> Iterator[Record]:
        """The records of those videos that have one, in their order."""
        for video in videos:
            if video.key in self._known:
                yield json.loads(self._known[video.key])
