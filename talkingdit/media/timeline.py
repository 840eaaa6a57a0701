# SPDX-License-Identifier: Apache-2.0
"""The one time line of a file: it begins at the earliest picture or sound that is shown, and both have places on it.

Clocks of files begin anywhere (a transport stream of a camera at ten hours), decoders throw away what primes them, and
pictures before the first key frame are never shown. All of that is settled here; everything else counts from 0.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from talkingdit.media.container import MediaFile
from talkingdit.media.notices import tell

SEARCH = 10  # seconds behind the first picture, or sound, in which the other one may still begin earlier
LAST_ENTRIES = 64  # of an index, one of which is the last in the file
UNEQUAL = Fraction(1, 10)  # seconds of sound by which lengths may differ untold: codecs fill up their last packets


@dataclass(frozen=True)
class Timeline:
    """Where a file begins.

    Args:
        origin: time of the file's own clock, in seconds, that is 0 on the line.
        pictures: where the first picture that is shown is on the line; None without any.
        sound: where the first sample that is heard is; None without sound, or where it begins seconds behind the
            pictures.
        first_samples: how many the first packet with sound has.
    """

    origin: Fraction = Fraction(0)
    pictures: Fraction | None = None
    sound: Fraction | None = None
    first_samples: int = 0


@dataclass(frozen=True)
class Length:
    """How much a file holds, found in its packets or in an index that agrees with the file.

    Args:
        count: pictures.
        pictures: where the last one stops being shown on the line, 0 without any.
        sound: where the sound ends on the line, 0 without sound.
        steady: its clock never starts anew, so that it can be searched.
    """

    count: int = 0
    pictures: Fraction = Fraction(0)
    sound: Fraction = Fraction(0)
    steady: bool = True


def timeline(path: str | os.PathLike[str]) -> Timeline:
    """Where a file begins; raises `MediaError` where it cannot be read."""
    return _timeline(*_known_by(path))


def length(path: str | os.PathLike[str]) -> Length:
    """How much a file holds; says so once where the file states something else. Raises `MediaError`."""
    return _length(*_known_by(path))


def may_seek(source: MediaFile) -> bool:
    """Can a file be searched by the times of its clock?"""
    return not source.restarts or length(source.path).steady


def _known_by(path: str | os.PathLike[str]) -> tuple[Path, int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return Path(path), 0, 0
    return Path(path), status.st_size, status.st_mtime_ns


class PictureTimes:
    """When pictures are shown, on the clock of the file.

    A picture has the time of its packet. Files that have times of packets alone, in the order in which they are decoded
    (AVI), show the k-th picture at the k-th of these. First pictures without a time are shown before the first one that
    has one, at the rate of the file; later ones a picture's length after the one before.
    """

    def __init__(self, source: MediaFile) -> None:
        self._source, self._stream = source, source.need_pictures()
        rate = self._stream.average_rate or self._stream.base_rate
        self.step = 1 / Fraction(rate) if rate else Fraction(1, 25)
        self._in_order: bool | None = True if source.container.format.name == "avi" else None
        self._decoded: list[int] = []  # times of packets whose pictures are still to come
        self._waiting: list[Any] = []  # pictures before the first one with a time
        self._last: Fraction | None = None

    def decode(self, packet: Any) -> Iterator[tuple[Fraction, Any]]:
        """The pictures that a packet brings, with their seconds."""
        if packet.size and packet.dts is not None:
            if self._in_order is None:
                self._in_order = packet.pts is None
            if self._in_order:
                heapq.heappush(self._decoded, packet.dts)
        for frame in self._source.decode(packet):
            at = self._time(frame)
            if at is None:
                self._waiting.append(frame)
                continue
            yield from self._released(at)
            self._last = at
            yield at, frame
        if not packet.size and self._waiting:  # no picture of the file has a time
            yield from self._released(len(self._waiting) * self.step)

    def _time(self, frame: Any) -> Fraction | None:
        stamp = frame.pts
        if self._in_order and self._decoded:
            stamp = heapq.heappop(self._decoded)
        if stamp is None:
            return None if self._last is None else self._last + self.step
        at = Fraction(stamp * self._stream.time_base)
        return at if self._last is None else max(at, self._last)

    def _released(self, at: Fraction) -> Iterator[tuple[Fraction, Any]]:
        waiting, self._waiting = self._waiting, []
        for before, frame in zip(range(len(waiting), 0, -1), waiting, strict=True):
            yield at - before * self.step, frame


class SoundTimes:
    """When sound is heard, on the clock of the file; what has no time goes on where the last ended."""

    def __init__(self, source: MediaFile) -> None:
        self._source, self._stream = source, source.need_sound()
        self._waiting: list[Any] = []
        self._end: Fraction | None = None

    def decode(self, packet: Any) -> Iterator[tuple[Fraction, Any]]:
        """The frames of sound that a packet brings, with the seconds of their first samples."""
        for frame in self._source.decode(packet):
            if frame.pts is not None:
                at = Fraction(frame.pts * self._stream.time_base)
            elif self._end is not None:
                at = self._end
            else:
                self._waiting.append(frame)
                continue
            yield from self._released(at)
            self._end = at + Fraction(frame.samples, frame.sample_rate)
            yield at, frame
        if not packet.size and self._waiting:  # none has a time
            yield from self._released(sum((_seconds(frame) for frame in self._waiting), Fraction(0)))

    def _released(self, at: Fraction) -> Iterator[tuple[Fraction, Any]]:
        waiting, self._waiting = self._waiting, []
        at -= sum((_seconds(frame) for frame in waiting), Fraction(0))
        for frame in waiting:
            yield at, frame
            at += _seconds(frame)


def _seconds(frame: Any) -> Fraction:
    return Fraction(frame.samples, frame.sample_rate)


@lru_cache(maxsize=1024)
def _timeline(path: Path, size: int, changed: int) -> Timeline:
    with MediaFile(path) as source:
        found: dict[str, Fraction] = {}
        samples = 0
        clocks: dict[int, PictureTimes | SoundTimes] = {}
        if source.pictures is not None:
            clocks[source.pictures.index] = PictureTimes(source)
        if source.sound is not None:
            clocks[source.sound.index] = SoundTimes(source)
        for packet in source.packets(*(s for s in (source.pictures, source.sound) if s is not None)):
            kind = packet.stream.type
            if kind not in found:
                for at, frame in clocks[packet.stream.index].decode(packet):
                    if kind not in found:
                        samples = frame.samples if kind == "audio" else samples
                        found[kind] = at
            stamp = packet.dts if packet.dts is not None else packet.pts
            late = found and stamp is not None and stamp * packet.time_base > min(found.values()) + SEARCH
            if len(found) == len(clocks) or late:
                break
        if not found:
            return Timeline()
        origin = min(found.values())
        places = {kind: at - origin for kind, at in found.items()}
        return Timeline(origin, places.get("video"), places.get("audio"), samples)


@lru_cache(maxsize=1024)
def _length(path: Path, size: int, changed: int) -> Length:
    line = _timeline(path, size, changed)
    with MediaFile(path) as source:
        indexed = _from_index(source, line, size)
        if indexed is not None:
            return indexed
        count, ends, last_sound = 0, {"video": Fraction(0), "audio": Fraction(0)}, None
        step = PictureTimes(source).step if source.pictures is not None else Fraction(0)
        in_order = source.container.format.name == "avi"
        for packet in source.packets(*(s for s in (source.pictures, source.sound) if s is not None)):
            stamp = packet.dts if packet.pts is None or (in_order and packet.stream.type == "video") else packet.pts
            if not packet.size or packet.is_discard:
                continue
            last = ends[packet.stream.type]  # what has no time, as in a bare stream of pictures, follows on the last
            at = last if stamp is None else stamp * packet.time_base - line.origin
            lasts = (packet.duration or 0) * packet.time_base
            if packet.stream.type == "video":
                if line.pictures is None or at < line.pictures:
                    continue  # before the first key frame
                lasts, count = lasts if lasts and stamp is not None else step, count + 1  # as `PictureTimes` counts
            else:
                last_sound = None if lasts else (at, packet)
            ends[packet.stream.type] = max(last, at + lasts)
        if last_sound is not None:  # no container says how long this packet is; its decoder does
            at, packet = last_sound
            ends["audio"] = max(ends["audio"], at + sum(map(_seconds, source.decode(packet)), Fraction(0)))
        steady = not source.clock.jumps
        if count:
            stream = source.need_pictures()
            seconds = ends["video"] + line.origin - (stream.start_time or 0) * stream.time_base
            agrees = compare(source, stream, seconds, max(step, UNEQUAL), "pictures")
        else:
            agrees = not ends["audio"] or compare(source, source.need_sound(), ends["audio"], UNEQUAL, "sound")
        # The library hides some new beginnings of chained Ogg, which it cannot search.
        steady &= agrees or source.container.format.name != "ogg"
        return Length(count, ends["video"], ends["audio"], steady)


def _from_index(source: MediaFile, line: Timeline, size: int) -> Length | None:
    """Of an MP4 or MOV, whose index names every packet; none where it says other things than the header, or names
    what the file does not hold."""
    if not source.container.format.name.startswith("mov"):
        return None
    ends, count = {"video": Fraction(0), "audio": Fraction(0)}, 0
    for stream in (source.pictures, source.sound):
        if stream is None:
            continue
        index = getattr(stream, "index_entries", None)
        if not index or not stream.duration:
            return None
        last = index[-1]
        if max(entry.pos + entry.size for entry in index[-LAST_ENTRIES:]) > size:
            return None
        stated = stream.duration * stream.time_base
        named = (last.timestamp - index[0].timestamp) * stream.time_base
        begins = line.pictures if stream.type == "video" else line.sound
        slack = 2 / Fraction(stream.average_rate or 25) if stream.type == "video" else Fraction(1, 2)
        if begins is None or abs(stated - named) > slack + UNEQUAL:
            return None
        ends[stream.type] = begins + stated
        if stream.type == "video":
            count = sum(not entry.is_discard for entry in index)
    return Length(count, ends["video"], ends["audio"])


def compare(source: MediaFile, stream: Any, seconds: Fraction, slack: Fraction, what: str) -> bool:
    """Does a file have the length that it states, to `slack` seconds? Says so where it does not.

    Args:
        stream: whose length it is.
        seconds: that were found.
        what: "sound" or "pictures".
    """
    alone = source.pictures is None or source.sound is None
    whole = source.container.duration
    if stream.duration:
        stated = stream.duration * stream.time_base
    elif whole and alone:
        stated = Fraction(whole, 1_000_000)
    else:
        return True
    begins = (stream.start_time or 0) * stream.time_base  # some count from 0, and not from where they begin
    if min(abs(stated - seconds), abs(stated - begins - seconds)) <= slack:
        return True
    tell(
        f"{source.path}: states {float(stated):.2f} s, holds {float(seconds):.2f} s of {what}; all of it is used.",
        about=f"length of {source.path}: {what}",
    )
    return False
