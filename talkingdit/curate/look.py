# SPDX-License-Identifier: Apache-2.0
"""A video, watched once: clip by clip, with the pictures and the sound that all stages share.

Pictures come from one pass over the file, so that a video of hours takes no more memory than its longest clip: small
ones for what happens over time, and a few large ones (stills) for what is to be seen in detail.
"""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from talkingdit.curate.settings import Watch
from talkingdit.detect.shots import Cuts
from talkingdit.media.container import MediaFile
from talkingdit.media.reader import read_pictures
from talkingdit.media.sound import SPEECH_RATE, sound_blocks
from talkingdit.media.timeline import timeline

Picture = NDArray[np.uint8]  # [H, W, 3] RGB
Samples = NDArray[np.float32]
FASTEST = Fraction(240)  # pictures a second that a header is believed


@dataclass(frozen=True)
class Still:
    """A large picture.

    Args:
        index: of the small picture of the same time.
        picture: uint8 [H, W, 3].
    """

    index: int
    picture: Picture


@dataclass(frozen=True)
class Look:
    """A clip as stages see it.

    Args:
        video: the file.
        number: of the clip in the video, from 0.
        shot: number of its shot in the video.
        start: seconds after the first picture of the video.
        fps: pictures a second.
        size: height and width in the file.
        pictures: uint8 [F, h, w, 3], small.
        stills: some of them, large.
        samples: float32 [n], 16 kHz mono, of the same time; none where the video has no sound.
    """

    video: Path
    number: int
    shot: int
    start: float
    fps: float
    size: tuple[int, int]
    pictures: Picture
    stills: list[Still]
    samples: Samples

    @property
    def seconds(self) -> float:
        return len(self.pictures) / self.fps

    @property
    def scale(self) -> float:
        """Pixels of the file per pixel of a small picture."""
        return self.size[0] / self.pictures.shape[1]

    def packed(self, most: int, spoken: Sequence[tuple[float, float]]) -> bytes:
        """The clip in few bytes, for another process: so many of its pictures, evenly, and its sound."""
        at = np.linspace(0, len(self.pictures) - 1, min(most or len(self.pictures), len(self.pictures))).round()
        told = [self.number, self.shot, self.start, len(at) / self.seconds, *self.size]
        file = io.BytesIO()
        np.savez(
            file,
            told=np.array(told, np.float64),
            pictures=self.pictures[at.astype(int)],
            samples=self.samples,
            spoken=np.array(spoken, np.float64).reshape(-1, 2),
        )
        return file.getvalue()


def unpacked(video: Path, data: bytes) -> tuple[Look, list[tuple[float, float]]]:
    """A clip that was `packed`, without stills, and where somebody speaks."""
    with np.load(io.BytesIO(data)) as held:
        number, shot, start, fps, height, width = held["told"].tolist()
        spoken = [(float(begin), float(end)) for begin, end in held["spoken"]]
        look = Look(
            video=video,
            number=int(number),
            shot=int(shot),
            start=start,
            fps=fps,
            size=(int(height), int(width)),
            pictures=held["pictures"],
            stills=[],
            samples=held["samples"],
        )
    return look, spoken


def looks(
    path: Path,
    watch: Watch,
    start: float = 0.0,
    end: float | None = None,
    find_cuts: bool = True,
    cuts: Sequence[float] | None = None,
) -> Iterator[Look]:
    """The clips of a video: its shots, and parts of shots that are longer than `watch.clip_seconds`.

    Args:
        path: the video.
        watch: how to watch it.
        start, end: seconds after its first picture, of the part that is watched.
        find_cuts: divide it into shots; otherwise it is one.
        cuts: seconds after its first picture at which there are cuts, where that is known already.

    Raises:
        UserError, MediaError: it cannot be read.
    """
    with MediaFile(path) as source:
        stream = source.need_pictures()
        rate = Fraction(stream.average_rate or stream.base_rate or 25)
        has_sound = source.sound is not None
    rate = min(max(rate, Fraction(1)), FASTEST)
    fps = rate / max(1, round(rate / Fraction(watch.fps).limit_denominator(1000)))
    begins = (timeline(path).pictures or Fraction(0)) + Fraction(start).limit_denominator(10**6)
    last = None if end is None else round((end - start) * fps)
    sound = _Sound(path, begins) if has_sound else None
    wanted = (begins + n / fps for n in itertools.count())
    finder: Cuts | _Known | None = Cuts(watch.cut) if find_cuts and cuts is None else None
    if cuts is not None:
        finder = _Known([round((at - start) * fps) for at in cuts])
    cutter = _Cutter(path, watch, fps, start, sound, finder)
    try:
        for number, frame in enumerate(read_pictures(path, wanted)):
            if number == last:
                break
            yield from cutter.add(frame)
        yield from cutter.finish()
    finally:
        if sound is not None:
            sound.close()


class _Known:
    """Cuts that were found before, in the form of a finder of cuts."""

    def __init__(self, cuts: list[int]) -> None:
        self._cuts, self.settled = cuts, 0

    def add(self, picture: Picture) -> list[tuple[int, float]]:
        self.settled += 1
        return [(at, 1.0) for at in self._cuts if at == self.settled - 1]

    def finish(self) -> list[tuple[int, float]]:
        return []


@dataclass
class _Cutter:
    """Keeps pictures until it is known where their clip ends."""

    path: Path
    watch: Watch
    fps: Fraction
    start: float
    sound: _Sound | None
    finder: Cuts | _Known | None
    number: int = 0
    shot: int = 0
    first: int = 0  # picture of the clip that is being kept
    seen: int = 0
    size: tuple[int, int] = (0, 0)
    pictures: list[Picture] = field(default_factory=list)
    stills: list[Still] = field(default_factory=list)
    cuts: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.longest = max(1, round(self.watch.clip_seconds * self.fps))
        self.still_every = max(1, round(self.watch.still_every * self.fps))

    def add(self, frame: Picture) -> Iterator[Look]:
        self.size = frame.shape[:2]
        if self.seen % self.still_every == self.still_every // 2:
            self.stills.append(Still(self.seen, _reduced(frame, self.watch.still_side)))
        self.pictures.append(_reduced(frame, self.watch.side))
        self.seen += 1
        if self.finder is None:
            yield from self._complete(self.seen)
            return
        self.cuts.extend(at for at, _ in self.finder.add(self.pictures[-1]))
        yield from self._complete(self.finder.settled)

    def finish(self) -> Iterator[Look]:
        if self.finder is not None:
            self.cuts.extend(at for at, _ in self.finder.finish())
        yield from self._complete(self.seen)
        if self.seen > self.first:
            yield self._take(self.seen)

    def _complete(self, settled: int) -> Iterator[Look]:
        """Clips whose ends are known."""
        while True:
            cut = self.cuts[0] if self.cuts else None
            if cut is not None and cut - self.first <= self.longest:
                self.cuts.popleft()
                if cut > self.first:
                    yield self._take(cut)
                self.shot += 1
            elif min(settled, cut or settled) - self.first >= self.longest:
                yield self._take(self.first + self.longest)
            else:
                return

    def _take(self, end: int) -> Look:
        count, fps = end - self.first, self.fps
        stills = [Still(s.index - self.first, s.picture) for s in self.stills if s.index < end]
        samples = np.zeros(0, np.float32)
        if self.sound is not None:
            samples = self.sound.until(round(end / fps * SPEECH_RATE))
        look = Look(
            video=self.path,
            number=self.number,
            shot=self.shot,
            start=self.start + float(self.first / fps),
            fps=float(fps),
            size=self.size,
            pictures=np.stack(self.pictures[:count]),
            stills=stills,
            samples=samples,
        )
        del self.pictures[:count]
        self.stills = [still for still in self.stills if still.index >= end]
        self.first, self.number = end, self.number + 1
        return look


class _Sound:
    """The sound of a video, read as far as its pictures are."""

    def __init__(self, path: Path, begins: Fraction) -> None:
        self._blocks = sound_blocks(path, SPEECH_RATE, begins)
        self._held: list[Samples] = []
        self._have = self._taken = 0

    def until(self, end: int) -> Samples:
        """Samples from the last `end` up to this one; fewer where the sound has ended."""
        while self._have < end:
            block = next(self._blocks, None)
            if block is None:
                break
            self._held.append(block)
            self._have += len(block)
        joined = np.concatenate([np.zeros(0, np.float32), *self._held])
        count = min(end - self._taken, len(joined))
        self._held, self._taken = [joined[count:].copy()], end  # a view would hold all of it
        return joined[:count]

    def close(self) -> None:
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()


def _reduced(frame: Picture, side: int) -> Picture:
    """A picture whose longer side is at most so many pixels."""
    import cv2

    scale = side / max(frame.shape[:2])
    if scale >= 1:
        return frame
    sides = max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale))
    return np.asarray(cv2.resize(frame, sides, interpolation=cv2.INTER_AREA), np.uint8)
