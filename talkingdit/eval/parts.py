# SPDX-License-Identifier: Apache-2.0
"""Long videos, judged part by part, so that an hour takes the memory of half a minute; and what parts make together.

The value of a long video is the mean of its parts', weighted by their frames; curves and features follow each other.
What is heard is judged as a whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from talkingdit.errors import UserError
from talkingdit.eval.clip import EvalClip, Frames, Sound, in_step, is_even, read_clip, read_truth

PART_SECONDS = 30.0  # of a video that are held at once


@dataclass(frozen=True)
class VideoPart:
    """A part of a video, and of its truth at the same times.

    Attributes:
        clip: of the video.
        truth: the same one where both are one file; shorter, or None, where the truth ends; None without a truth.
        number: of the part, from 0.
        whole: is it all of the video?
    """

    clip: EvalClip
    truth: EvalClip | None
    number: int = 0
    whole: bool = True


def is_long(path: Path) -> bool:
    """Is a video judged in parts? No one that cannot be read is."""
    from talkingdit.media.container import MediaError
    from talkingdit.media.timeline import length, timeline

    try:
        return length(path).pictures - (timeline(path).pictures or 0) > PART_SECONDS
    except (MediaError, OSError):
        return False


def read_parts(gen: Path, truth: Path | None) -> Iterator[VideoPart]:
    """A video with its truth: as a whole, or in equal parts of at most `PART_SECONDS`.

    Raises:
        UserError: no such file, or not a video.
    """
    if not is_long(gen):
        clip = read_clip(gen)
        yield VideoPart(clip, None if truth is None else clip if truth == gen else read_truth(truth, clip))
        return
    mine = _Stream(gen)
    count = _equal(gen, mine.fps)
    pictures = mine.pictures(None if is_even(gen) else mine.fps)
    true = None if truth is None or truth == gen else _Stream(truth)
    its: Iterator[Frames] = iter(()) if true is None else true.pictures(None if true.runs_like(mine) else mine.fps)
    for number in itertools.count():
        frames = _some(pictures, count)
        if frames is None:
            return
        clip = mine.clip(frames, mine.fps, number * count)
        beside = None if true is None else _some(its, len(frames))
        other = None if true is None or beside is None else true.clip(beside, mine.fps, number * count)
        yield VideoPart(clip, clip if truth == gen else other, number, whole=False)
        del frames, clip, beside, other  # while the next ones are read


def _equal(path: Path, fps: Fraction) -> int:
    """Frames of a part: as many in each, so that none is too short for a metric."""
    from talkingdit.media.timeline import length

    frames = max(1, length(path).count)
    return math.ceil(frames / math.ceil(frames / (PART_SECONDS * fps)))


def read_sound(path: Path) -> Sound | None:
    """All that is heard in a video, at `SPEECH_RATE`, from its first frame on; None without a sound track."""
    stream = _Stream(path)
    return stream.sound(0, None)


def _some(pictures: Iterator[Frames], count: int) -> Frames | None:
    """The next of them, at most so many, held once; None where there are no more."""
    held: Frames | None = None
    n = 0
    for n, picture in enumerate(itertools.islice(pictures, count), 1):
        if held is None:
            held = np.empty((count, *picture.shape), np.uint8)
        held[n - 1] = picture
    return None if held is None else held[:n]


class _Stream:
    """A video that is read as it is asked for; raises UserError where it is none."""

    def __init__(self, path: Path) -> None:
        from talkingdit.media.checks import existing_file
        from talkingdit.media.container import MediaError, MediaFile
        from talkingdit.media.timeline import length, timeline

        self.path = existing_file(path, "video")
        try:
            with MediaFile(path) as source:
                stream = source.need_pictures()
                self.fps = Fraction(stream.average_rate or stream.base_rate or 0)
                self._heard = source.sound is not None
            self._begins = timeline(path).pictures or Fraction(0)
            self.count = length(path).count
        except MediaError as error:
            raise _no_video(path, error) from None
        if not self.fps:
            raise UserError(f"video {str(path)!r}: expected a frame rate, got none.")

    def runs_like(self, other: _Stream) -> bool:
        return in_step(self.fps, other.fps, other.count) and is_even(self.path)

    def pictures(self, fps: Fraction | None = None) -> Iterator[Frames]:
        """All of them, or those at so many times a second."""
        from talkingdit.media.container import MediaError
        from talkingdit.media.reader import all_pictures, read_pictures

        try:
            if fps is None:
                yield from all_pictures(self.path)
            else:
                yield from read_pictures(self.path, (self._begins + i / fps for i in itertools.count()))
        except MediaError as error:
            raise _no_video(self.path, error) from None

    def clip(self, frames: Frames, fps: Fraction, first: int) -> EvalClip:
        sound = self.sound(first / fps, len(frames) / fps)
        return EvalClip(frames, float(fps), sound, self.path.name)

    def sound(self, start: Fraction | int, seconds: Fraction | None) -> Sound | None:
        """What is heard from so many seconds after the first frame on; None where nothing is."""
        from talkingdit.media.sound import SPEECH_RATE, sound_blocks

        if not self._heard:
            return None
        blocks = list(sound_blocks(self.path, SPEECH_RATE, self._begins + start, seconds))
        return np.concatenate(blocks) if blocks else None


def _no_video(path: Path, error: Exception) -> UserError:
    return UserError(f"video {str(path)!r}: expected a video, got a file that cannot be decoded ({error})")


# ---- What parts make together ----------------------------------------------------------------------------------------


def join_values(parts: Sequence[tuple[int, Mapping[str, dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """Values of a video from those of its parts, each with the number of its frames that were judged."""
    keys = dict.fromkeys(key for _, values in parts for key in values)
    return {key: _join([(frames, values[key]) for frames, values in parts if key in values]) for key in keys}


def _join(parts: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    known = [(frames, value) for frames, value in parts if "missing" not in value]
    if len(parts) == 1 or not known:
        return parts[0][1]
    mean = float(np.average([value["value"] for _, value in known], weights=[frames for frames, _ in known]))
    curve: list[float | None] = []
    if any(value["curve"] for _, value in known):
        for frames, value in parts:
            mine = list(value.get("curve", ()))[:frames]
            curve += mine + [None] * (frames - len(mine))
    notes = dict.fromkeys(value["note"] for _, value in known if value["note"])
    told = f"mean of {len(known)} parts of at most {PART_SECONDS:g} s"
    return {"value": mean, "curve": curve, "note": "; ".join([*notes, told])}


def join_facts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Facts of a video from those of its parts: numbers of frames and seconds add up."""
    facts = dict(parts[0])
    for name in ("frames", "seconds", "compared"):
        if name in facts:
            facts[name] = round(sum(part.get(name, 0) for part in parts), 3)
    if "people" in facts:
        facts["people"] = max(part.get("people", 0) for part in parts)
    facts["sound"] = any(part["sound"] for part in parts)
    short = facts["frames"] - facts.get("compared", facts["frames"])
    facts.pop("note", None)
    return facts | ({"note": f"the true video ends {short} frames earlier"} if short else {})
