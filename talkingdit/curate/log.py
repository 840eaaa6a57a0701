# SPDX-License-Identifier: Apache-2.0
"""Records of videos, a line each in `figures.jsonl`, written by one process: what is in it is done.

A line is there as a whole or not at all (`append_line`). The last one of a video counts, if the file is still the one
that was watched and the settings are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from talkingdit.atomic import append_line
from talkingdit.curate.measure import FORM, Record, Video, forget, stamp_of
from talkingdit.curate.versions import Versions

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

    def missing(self, videos: Iterable[Video], versions: Versions, again: bool = False) -> list[Video]:
        """The videos that are still to be watched; where stages that stand alone are all that is missing, for these.

        Args:
            videos: all of them.
            versions: of the settings.
            again: broken ones too, and stages that lacked a package.
        """
        left = []
        for video in videos:
            line = self._known.get(video.key)
            record = {} if line is None else json.loads(line)
            same = record.get("watch") == versions.base and all(
                record.get(name) == value for name, value in stamp_of(video).items()
            )
            if not same:
                left.append(video)
                continue
            lacked = set(record["lacking"]) if again else set()
            todo = [n for n, version in versions.stages.items() if record["stages"].get(n) != version or n in lacked]
            if record["error"]:
                left += [video] if again or todo else []
            elif lacked - set(versions.stages):
                left.append(video)
            elif todo:
                left.append(replace(video, before=record, todo=tuple(todo)))
        return left

    def records(self, videos: Iterable[Video], versions: Versions) -> Iterator[Record]:
        """The records of those videos that have one, in their order, without figures of other versions."""
        for video in videos:
            if video.key in self._known:
                record = json.loads(self._known[video.key])
                old = {n for n, version in record["stages"].items() if versions.stages.get(n) != version}
                for clip in record["clips"]:
                    forget(clip, old)
                yield record
