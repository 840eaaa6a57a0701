# SPDX-License-Identifier: Apache-2.0
"""Pictures of a video at the times of its time line: upright, with square pixels, in sRGB's range of values.

Times are seconds of the time line of the file (`timeline.py`), on which its sound has its places too (`sound.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.media.container import MediaFile
from talkingdit.media.notices import tell
from talkingdit.media.opening import SCALER_THREADS
from talkingdit.media.profiles import PRIMARIES, Space, pixels_to_srgb
from talkingdit.media.timeline import PictureTimes, may_seek, timeline

Frames = NDArray[np.uint8]

BACK = (0, 2, 10)  # seconds before the wanted time at which a key frame is searched for
WIDEST_PIXEL = 8  # times as wide as high; what files say beyond that is wrong
BT709, UNKNOWN = 1, 2  # colour spaces, as H.273 numbers them
SD_LINES = 576  # videos of more lines that name no colour space are BT.709
WIDE = (9, 11, 12)  # colour primaries that differ visibly from those of sRGB: BT.2020, DCI-P3, Display P3
PQ = 16  # transfer characteristics


class Upright:
    """Makes pictures as they are to be seen: turned and mirrored as the file says, with square pixels.

    All pictures of a video get the size of its first one, also where its resolution changes. Wide colours become those
    of sRGB; of HLG what a screen of standard range shows, as it is made for both. PQ is not: it is told.

    Args:
        stream: of pictures.
        name: of their file, for what is told.
    """

    def __init__(self, stream: Any, name: str = "video") -> None:
        self._pixel, self._name = _pixel_shape(stream), name
        codec = stream.codec_context
        self._curve, self._primaries = codec.color_trc, codec.color_primaries  # of the container
        self._size: tuple[int, int] | None = None  # height and width, before turning

    def size(self, frame: Any) -> tuple[int, int]:
        """Height and width of what `__call__` makes."""
        height, width = self._square(frame)
        return (width, height) if _turns(frame)[0] else (height, width)

    def __call__(self, frame: Any) -> Frames:
        """A decoded picture as uint8 [H, W, 3] RGB."""
        height, width = self._square(frame)
        if frame.colorspace == UNKNOWN and frame.height > SD_LINES:
            frame.colorspace = BT709
        if (height, width) == (frame.height, frame.width):
            pixels = frame.to_ndarray(format="rgb24", threads=SCALER_THREADS)
        else:
            pixels = frame.reformat(
                width, height, "rgb24", interpolation="BICUBIC", threads=SCALER_THREADS
            ).to_ndarray()
        across, leftwards, upwards = _turns(frame)
        pixels = pixels.transpose(1, 0, 2) if across else pixels
        pixels = pixels[:, ::-1] if leftwards else pixels
        pixels = pixels[::-1] if upwards else pixels
        pixels = np.ascontiguousarray(pixels)
        curve, primaries = _known(frame.color_trc, self._curve), _known(frame.color_primaries, self._primaries)
        if curve == PQ:
            tell(
                f"{self._name}: a high-range video (PQ), whose colours are read as they stand, too pale; convert it "
                "to standard range first."
            )
        elif primaries in WIDE:
            pixels = pixels_to_srgb(pixels, Space(PRIMARIES[primaries]))
        return pixels

    def _square(self, frame: Any) -> tuple[int, int]:
        if self._size is None:
            height, width = frame.height, frame.width
            if self._pixel > 1:
                width = round(width * self._pixel)
            elif self._pixel < 1:
                height = round(height / self._pixel)
            self._size = height, width
        return self._size


def _known(code: int, otherwise: int) -> int:
    """A code point of H.273, or another one where it says nothing."""
    return otherwise if code in (0, UNKNOWN) else code


def _pixel_shape(stream: Any) -> Fraction:
    """Width of a pixel in heights."""
    ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    if not ratio or not Fraction(1, WIDEST_PIXEL) <= ratio <= WIDEST_PIXEL:
        return Fraction(1)
    return Fraction(ratio)


def _turns(frame: Any) -> tuple[bool, bool, bool]:
    """What the display matrix of a picture asks for: rows become columns, left becomes right, top becomes bottom."""
    from av.sidedata.sidedata import Type

    found = frame.side_data.get(Type.DISPLAYMATRIX)
    if found is None:
        return False, False, False
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(found), np.int32)[:5])
    # A point (x, y) of the picture is shown at (a x + c y, b x + d y).
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def timed_pictures(source: MediaFile, start: Fraction = Fraction(0)) -> Iterator[tuple[Fraction, Any]]:
    """Decoded pictures with their seconds on the time line, up to the end of the data.

    Args:
        source: an open file, not read yet.
        start: the first picture is the last one at or before this time, or an earlier one.

    Raises:
        NoStreamError: there are no pictures.
    """
    import av

    stream = source.need_pictures()
    origin = timeline(source.path).origin
    if start > 0 and may_seek(source):
        for back in BACK:
            try:
                source.seek(origin + max(start - back, Fraction(0)), stream)
            except av.FFmpegError:
                break
            pictures = _decoded(source, origin)
            first = next(pictures, None)
            if first is not None and first[0] <= start:
                yield first
                yield from pictures
                return
        source.rewind()
    yield from _decoded(source, origin)


def _decoded(source: MediaFile, origin: Fraction) -> Iterator[tuple[Fraction, Any]]:
    stream = source.need_pictures()
    if not stream.codec_context.is_open:
        stream.thread_type = "AUTO"
    times = PictureTimes(source)
    for packet in source.packets(stream):
        for at, frame in times.decode(packet):
            yield at - origin, frame


def read_pictures(path: str | os.PathLike[str], wanted: Iterable[Fraction]) -> Iterator[Frames]:
    """The pictures of a video that are nearest to some times, the later one of two that are as near.

    Decoding begins at the key frame before the first of them, or at the beginning of a file that cannot be searched.
    Pictures end half a picture's length before the last one is over: there are fewer than wanted then.

    Args:
        path: a video.
        wanted: ascending seconds of its time line, as many as there are; read as pictures are taken.

    Yields:
        One uint8 [H, W, 3] RGB per time; the same array again where a picture is the nearest to several.

    Raises:
        MediaError: the file cannot be opened, or has no pictures.
    """
    times = iter(wanted)
    first = next(times, None)
    if first is None:
        return
    with MediaFile(path) as source:
        stream = source.need_pictures()
        upright = Upright(stream, str(path))
        rate = stream.average_rate or stream.base_rate
        slack = Fraction(1, 2) / rate if rate else Fraction(1, 50)
        shown: tuple[Any, Frames] | None = None
        for frame in _nearest(timed_pictures(source, first), first, times, slack, stream.time_base):
            if shown is None or shown[0] is not frame:
                shown = frame, upright(frame)
            yield shown[1]
        source.tell_broken("pictures")


def _nearest(
    pictures: Iterator[tuple[Fraction, Any]],
    wanted: Fraction | None,
    times: Iterator[Fraction],
    slack: Fraction,
    tick: Fraction,
) -> Iterator[Any]:
    """The picture nearest to each time; the last one serves times up to `slack` before it would end.

    Args:
        pictures: with their seconds.
        wanted, times: the first time, and those behind it.
        slack: half a picture's length.
        tick: the unit of pictures' durations, in seconds.
    """
    before: tuple[Fraction, Any] | None = None
    for at, frame in pictures:
        while wanted is not None and at > wanted:
            if before is None or at - wanted <= wanted - before[0]:
                break
            yield before[1]
            wanted = next(times, None)
        if wanted is None:
            return
        before = (at, frame)
    if before is None:
        return
    last = (before[1].duration or 0) * tick
    while wanted is not None and wanted <= before[0] + max(slack, last - slack):
        yield before[1]
        wanted = next(times, None)


def all_pictures(path: str | os.PathLike[str]) -> Iterator[Frames]:
    """Every picture of a video, uint8 [H, W, 3] RGB, in the order in which they are shown; raises `MediaError`."""
    with MediaFile(Path(path)) as source:
        upright = Upright(source.need_pictures(), str(path))
        for _, frame in timed_pictures(source):
            yield upright(frame)
        source.tell_broken("pictures")
