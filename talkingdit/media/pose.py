# SPDX-License-Identifier: Apache-2.0
"""Videos that show how a person moves, picture by picture at the rate of the video to make."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from talkingdit.errors import UserError
from talkingdit.media.checks import existing_file
from talkingdit.media.container import MediaError, MediaFile, NoStreamError
from talkingdit.media.framing import Frames, fit_pose
from talkingdit.media.reader import all_pictures, read_pictures, timed_pictures

if TYPE_CHECKING:
    from torch import Tensor


class PoseVideo:
    """A video that shows how the person moves, read as it is needed.

    Picture p is the one nearest to p / fps seconds of the file's time line, whatever its rate is and whether it is
    constant. Where a file has sound and pictures, its sound is on the same line: voice and pose may be one file.

    Args:
        path: any video file.
        fps: frames per second of the video to make.
        official: take every n-th frame, n the nearest to the quotient of both rates, as the official program does;
            a video of 24, 25 or 30 frames per second then runs too fast.

    Raises:
        UserError: no such file, or not a video.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float, official: bool = False):
        self.path = existing_file(path, "pose")
        try:
            with MediaFile(self.path) as source:
                stream = source.need_pictures()
                rate = float(stream.average_rate or stream.base_rate or fps)
                if next(timed_pictures(source), None) is None:
                    raise NoStreamError(source.undecoded(stream) if source.broken else "a file without frames")
        except NoStreamError as error:
            raise UserError(f"pose {str(self.path)!r}: expected a video, got {error}.") from error
        except MediaError as error:
            raise UserError(f"pose {str(self.path)!r}: expected a video, got a file that is none ({error}).") from error
        self._fps = Fraction(fps).limit_denominator(1001)
        self._step = max(1, round(rate / fps)) if official else None
        self.frames = 0  # read so far

    def _read(self, first: int) -> Iterator[Frames]:
        """Pictures from `first` on, until the file ends."""
        if self._step is None:
            found = read_pictures(self.path, (Fraction(p) / self._fps for p in itertools.count(first)))
        else:
            found = itertools.islice(all_pictures(self.path), first * self._step, None, self._step)
        for number, frame in enumerate(found, first + 1):
            self.frames = number
            yield frame

    def clips(self, frames: int, size: tuple[int, int], first: int = 0) -> Iterator[Tensor]:
        """Clips of `frames` frames without end, beginning with clip `first`: [1, 3, frames, *size] in -1..1.

        After the end of the file frames are black.
        """
        import torch

        source = self._read(first * frames)
        while True:
            clip = torch.full((1, 3, frames, *size), -1.0)
            for i in range(frames):
                frame = next(source, None)
                if frame is None:
                    break
                clip[0, :, i] = fit_pose(frame, size)
            yield clip
