# SPDX-License-Identifier: Apache-2.0
"""A video that is to be changed and stays as it is elsewhere: its pictures at its own rate, from its first to its last.

Files whose rate varies are taken at their average rate, each time the nearest picture; others give every picture once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from talkingdit.errors import UserError
from talkingdit.media.checks import existing_file
from talkingdit.media.container import MediaError, MediaFile, NoStreamError
from talkingdit.media.framing import Frames
from talkingdit.media.reader import Upright, read_pictures, timed_pictures
from talkingdit.media.timeline import length, timeline

FASTEST = 240  # pictures per second


@dataclass(frozen=True)
class EditedVideo:
    """What is known of a video file before its pictures are read. Made by `open_edited`.

    Attributes:
        rate: pictures per second.
        frames: how many there are at this rate.
        size: height and width as it is seen: upright, with square pixels.
        start: where its first picture is on its time line, in seconds.
    """

    path: Path
    rate: Fraction
    frames: int
    size: tuple[int, int]
    start: Fraction

    def read(self, first: int = 0, count: int | None = None) -> Iterator[Frames]:
        """Pictures uint8 [H, W, 3] RGB from `first` on, `count` of them or up to the end.

        Where the data end early, the last picture stays.
        """
        last = self.frames if count is None else min(first + count, self.frames)
        wanted = (self.start + Fraction(number) / self.rate for number in range(first, last))
        shown = None
        read = 0
        for shown in read_pictures(self.path, wanted):
            read += 1
            yield shown
        if read < last - first:
            if shown is None:  # nothing here: the last one that there is
                shown = next(self.read(max(0, first - 1), 1)) if first else np.zeros((*self.size, 3), np.uint8)
            yield from itertools.repeat(shown, last - first - read)


def open_edited(path: str | os.PathLike[str]) -> EditedVideo:
    """Look at a video that is to be changed.

    Raises:
        UserError: no such file, or not a video.
    """
    file = existing_file(path, "video")
    try:
        with MediaFile(file) as source:
            stream = source.need_pictures()
            rate = stream.average_rate or stream.base_rate
            upright = Upright(stream)
            first = next(timed_pictures(source), None)
            if first is None:
                raise NoStreamError(source.undecoded(stream) if source.broken else "a file without frames")
            size = upright.size(first[1])
        start = timeline(file).pictures
        found = length(file)
    except NoStreamError as error:
        raise UserError(f"video {str(file)!r}: expected a video, got {error}.") from error
    except MediaError as error:
        raise UserError(f"video {str(file)!r}: expected a video, got a file that is none ({error}).") from error
    start = first[0] if start is None else start
    seconds = found.pictures - start
    if not rate or not 0 < rate <= FASTEST:
        rate = Fraction(found.count) / seconds if seconds > 0 and found.count else Fraction(25)
    rate = Fraction(rate).limit_denominator(1001)
    return EditedVideo(file, rate, max(1, round(seconds * rate)), size, start)
