# SPDX-License-Identifier: Apache-2.0
"""A media file that is open: its streams, and its packets on one running clock, until the data ends.

Headers are hints. Packets are read until there are none; what cannot be decoded is left out and counted. The clock of
some containers (MPEG-TS, chained Ogg) may start anew in the middle of a file: what follows is moved behind what came
before, sound and pictures alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

from talkingdit.media.checks import reason_of
from talkingdit.media.headers import mended
from talkingdit.media.notices import tell
from talkingdit.media.opening import open_container

RESTARTS = 0x0200  # among the flags of a container: AVFMT_TS_DISCONT
JUMP = 10  # seconds: a clock that may start anew, and is ahead by more, has
LONGEST_GAP = 3600  # seconds that any other clock is believed to have lost
OVERLAP = Fraction(1, 20)  # seconds that sound may lie back without its clock having started anew
DISORDER = 1  # seconds that pictures may lie back, whose packets are out of order
REORDERED = 17  # pictures that they may lie back, where that is more
MOST_ERRORS = 16  # failed reads on end after which a file is taken to have ended


class MediaError(Exception):
    """A file cannot be read. The text is a reason in brackets' form: "Invalid data found when processing input"."""


class NoStreamError(MediaError):
    """A file has no sound, or no pictures."""


@dataclass
class Clock:
    """Brings the time stamps of packets onto one clock that does not start anew.

    Args:
        restarts: the container allows clocks that do.
    """

    restarts: bool
    offset: Fraction = Fraction(0)  # seconds
    jumps: int = 0
    _ends: dict[int, Fraction] = field(default_factory=dict)

    def mend(self, packet: Any) -> None:
        """Change the time stamps of the next packet in file order where the clock has jumped before it."""
        stamp = packet.dts if packet.dts is not None else packet.pts
        if stamp is None:
            return
        base, stream = packet.time_base, packet.stream
        at = stamp * base + self.offset
        end = self._ends.get(stream.index)
        if end is not None:
            back = OVERLAP if self.restarts and stream.type == "audio" and packet.dts is not None else _disorder(stream)
            ahead = JUMP if self.restarts else LONGEST_GAP
            if at < end - back or at > max(self._ends.values()) + ahead:
                self.offset += end - at
                self.jumps += 1
                at = end
        self._ends[stream.index] = at + (packet.duration or 0) * base
        if self.offset:
            shift = round(self.offset / base)
            packet.dts = None if packet.dts is None else packet.dts + shift
            packet.pts = None if packet.pts is None else packet.pts + shift


def _disorder(stream: Any) -> Fraction:
    """Seconds that the time of a packet may lie behind that of the one before."""
    rate = stream.average_rate if stream.type == "video" else None
    return max(Fraction(DISORDER), REORDERED / Fraction(rate)) if rate else Fraction(DISORDER)


@dataclass(frozen=True)
class End:
    """What comes after the last packet of a stream."""

    stream: Any
    size: int = 0
    pts: int | None = None
    dts: int | None = None


class MediaFile:
    """A media file, open for reading in a `with` block.

    It is opened by descriptor, so that no name is taken for the address of something, and a playlist opens nothing
    else.

    Args:
        path: the file.

    Raises:
        MediaError: it is no media file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.broken = 0
        """Packets that could not be decoded."""
        self._open()

    def _open(self) -> None:
        import av

        try:
            self._file = self.path.open("rb")
        except (OSError, ValueError) as error:
            raise MediaError(reason_of(error)) from None
        try:
            view, options = mended(self._file)
            self.container = open_container(view, options=options)
        except (av.FFmpegError, OSError, ValueError) as error:
            self._file.close()
            raise MediaError(reason_of(error)) from None
        self.restarts = bool(self.container.format.flags & RESTARTS)
        self.clock = Clock(self.restarts)
        self._video = _first(self.container.streams.video)
        self._audio = _first(self.container.streams.audio)

    def __enter__(self) -> MediaFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.container.close()
        self._file.close()

    @property
    def pictures(self) -> Any | None:
        """The stream of pictures, none where there is only a cover."""
        return self._video

    @property
    def sound(self) -> Any | None:
        """The stream of sound."""
        return self._audio

    def need_pictures(self) -> Any:
        """The stream of pictures; raises `NoStreamError`."""
        if self._video is None:
            raise NoStreamError("a file without a video stream")
        return self._video

    def need_sound(self) -> Any:
        """The stream of sound; raises `NoStreamError`."""
        if self._audio is None:
            raise NoStreamError("a file without an audio stream")
        return self._audio

    def seek(self, seconds: Fraction, stream: Any) -> None:
        """Go to a packet at or before a time of the clock, or near it; raises av.FFmpegError where it cannot."""
        self.container.seek(int(seconds / stream.time_base), stream=stream)
        self.clock = Clock(self.restarts)

    def rewind(self) -> None:
        """Begin anew, also after a search that failed; streams that were asked for before are no longer good."""
        self.close()
        self._open()

    def packets(self, *wanted: Any) -> Iterator[Any]:
        """The packets of streams in file order, up to the end of the data, their time stamps mended.

        After the last one comes an `End` for each stream, for which its decoder gives what it holds back.
        """
        import av

        # Where clocks start anew, all streams are needed to see it.
        streams = [s for s in (self._video, self._audio) if s is not None and (self.restarts or s in wanted)]
        errors = 0
        packets = self.container.demux(streams)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except (av.FFmpegError, OSError):
                errors += 1
                if errors > MOST_ERRORS:
                    break
                packets = self.container.demux(streams)
                continue
            if packet.dts is None and packet.pts is None and not packet.size:
                continue  # the flushes are ours: there are none after errors
            errors = 0
            self.clock.mend(packet)
            if packet.stream in wanted:
                yield packet
        for stream in wanted:
            yield End(stream)

    def decode(self, packet: Any) -> list[Any]:
        """What a packet's decoder gives for it; nothing, and one more in `broken`, where it cannot be decoded."""
        import av

        try:
            return packet.decode() if packet.size else packet.stream.decode(None)
        except EOFError:
            return []
        except (av.FFmpegError, ValueError):
            self.broken += 1
            return []

    def undecoded(self, stream: Any) -> str:
        """What a file is whose packets of a stream all are broken."""
        packets = "1 packet" if self.broken == 1 else f"{self.broken} packets"
        return f"a file of {packets} of {stream.codec_context.name}, none of which can be decoded"

    def tell_broken(self, what: str) -> None:
        """Say how much of the sound, or of the pictures, could not be decoded."""
        if self.broken:
            packets = "1 packet" if self.broken == 1 else f"{self.broken} packets"
            tell(f"{self.path}: {packets} of its {what} cannot be decoded; left out.")


def _first(streams: Any) -> Any | None:
    """The stream that players show: the first that is marked as the one, no cover, and known to the library."""
    from av.stream import Disposition

    cover = Disposition.attached_pic
    usable = [s for s in streams if s.codec_context is not None and not s.disposition & cover]
    usable = [s for s in usable if s.type != "audio" or s.rate] or usable
    marked = [s for s in usable if s.disposition & Disposition.default]
    return (marked or usable or [None])[0]
