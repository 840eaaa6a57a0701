# SPDX-License-Identifier: Apache-2.0
"""From the packets of a file to samples at their places on its time line, without gaps and overlaps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.media.container import MediaFile
from talkingdit.media.timeline import SoundTimes, Timeline, may_seek, timeline

Samples = NDArray[np.float32]

SEEK_MARGIN = Fraction(1, 2)  # seconds before a part at which decoding begins: codecs need a packet or two to settle
EDGE = Fraction(1, 4)  # seconds beside a part that are converted with it, so that it has no edges of its own
SMALLEST_GAP, LARGEST_JITTER = Fraction(1, 100), Fraction(1, 25)  # seconds
GRID = Fraction(1, 500)  # seconds by which the clock of a container may be too coarse to tell a sample's place

KINDS = {"u8": (128.0, 128.0), "s16": (0.0, 2.0**15), "s32": (0.0, 2.0**31), "s64": (0.0, 2.0**63)}  # zero, full scale


@dataclass(frozen=True)
class SoundPiece:
    """Samples of a file as they were decoded.

    Args:
        at: seconds on the time line of the first one.
        rate: in Hz.
        samples: [n, channels].
    """

    at: Fraction
    rate: int
    samples: Samples


def conversion_start(start: Fraction) -> Fraction:
    """Where on the line conversion begins for a part: at a whole second, where samples of all rates lie."""
    return Fraction(max(0, math.floor(start - EDGE)))


def pieces_from(source: MediaFile, start: Fraction) -> tuple[Fraction, Iterator[SoundPiece]]:
    """Where on the line what is decoded is to begin, at 0 or a little before a part from `start` on, and what it is."""
    import av

    source.need_sound()
    line = timeline(source.path)
    begin = conversion_start(start)
    if begin > SEEK_MARGIN and may_seek(source):
        try:
            source.seek(line.origin + begin - SEEK_MARGIN, source.need_sound())
            placed = _placed(_decoded(source, line.origin), line, begin, source.need_sound().time_base)
        except av.FFmpegError:
            placed = None
        if placed is not None:
            return placed
        source.rewind()
    return Fraction(0), _decoded(source, line.origin)


def _decoded(source: MediaFile, origin: Fraction) -> Iterator[SoundPiece]:
    times = SoundTimes(source)
    for packet in source.packets(source.need_sound()):
        for at, frame in times.decode(packet):
            if frame.samples:
                yield SoundPiece(at - origin, frame.sample_rate, as_floats(frame))


def _placed(
    pieces: Iterator[SoundPiece], line: Timeline, wanted: Fraction, tick: Fraction
) -> tuple[Fraction, Iterator[SoundPiece]] | None:
    """Pieces behind a search, and the place of the first one; None where it is behind `wanted`, or not known exactly.

    The clocks of some containers tick in milliseconds. Packets of most codecs are equally long, so that a place is that
    of the end of the file's first packet and a multiple of this length.
    """
    settled = list(itertools.islice(pieces, 4))[1:]
    if not settled or settled[0].at > wanted or line.sound is None:
        return None
    first, rate, count = settled[0].at, settled[0].rate, len(settled[0].samples)
    equal = all(len(piece.samples) == count for piece in settled[:-1])
    place = exact_place(first * rate, line, rate, count if equal else 0, tick)
    if place is None:
        return None
    shift = Fraction(place, rate) - first
    moved = (SoundPiece(piece.at + shift, piece.rate, piece.samples) for piece in itertools.chain(settled, pieces))
    return first + shift, moved


def exact_place(near: Fraction, line: Timeline, rate: int, packet: int, tick: Fraction) -> int | None:
    """The sample at which a packet begins, whose clock may be too coarse to say so; None where it is not known.

    Args:
        near: the sample by the clock.
        line: of the file.
        rate: samples per second.
        packet: samples of all packets but the first and the last, 0 where they differ.
        tick: seconds by which the clock goes on.
    """
    if tick * rate <= 1 and near.denominator == 1:
        return int(near)
    if not packet or line.sound is None:
        return None
    grid = round(line.sound * rate) + line.first_samples
    exact = grid + round((near - grid) / packet) * packet
    return exact if abs(exact - near) <= GRID * rate else None


def as_floats(frame: Any) -> Samples:
    """Decoded samples [n, channels], full scale at 1."""
    values = frame.to_ndarray()
    channels = frame.layout.nb_channels
    values = values.T if frame.format.is_planar else values.reshape(-1, channels)
    zero, full = KINDS.get(frame.format.name.removesuffix("p"), (0.0, 1.0))
    if full == 1.0:
        return np.ascontiguousarray(values, dtype=np.float32)
    return ((values.astype(np.float64) - zero) / full).astype(np.float32)


def joined(pieces: Iterator[SoundPiece], begin: Fraction) -> Iterator[SoundPiece]:
    """Pieces without gaps from `begin` on: silence where the clock goes on without samples, overlaps left out.

    A difference of less than three quarters of a packet is jitter of the clock, and samples follow on each other.
    """
    end, first = begin, True
    for piece in pieces:
        samples, rate = piece.samples, piece.rate
        ahead = piece.at - end
        if first or abs(ahead) > _slack(len(samples), rate):
            missing = round(ahead * rate)
            for silence in _silence(missing, rate, samples.shape[1]):
                yield SoundPiece(end, rate, silence)
            end += Fraction(max(missing, 0), rate)
            samples = samples[max(-missing, 0) :]
        if len(samples):
            first = False
            yield SoundPiece(end, rate, samples)
            end += Fraction(len(samples), rate)


def behind(pieces: Iterator[SoundPiece], begin: Fraction) -> Iterator[SoundPiece]:
    """What is left of pieces that follow on each other from a time on."""
    for piece in pieces:
        before = round((begin - piece.at) * piece.rate)
        if before <= 0:
            yield piece
        elif before < len(piece.samples):
            yield SoundPiece(begin, piece.rate, piece.samples[before:])


def _slack(samples: int, rate: int) -> Fraction:
    """Seconds by which the clock of a packet may jitter."""
    return min(max(Fraction(3 * samples, 4 * rate), SMALLEST_GAP), LARGEST_JITTER)


def _silence(count: int, rate: int, channels: int) -> Iterator[Samples]:
    for at in range(0, count, rate):
        yield np.zeros((min(rate, count - at), channels), np.float32)


# ---- What the sound of a file is -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """What the sound of a file is, after all of it was decoded.

    Args:
        rate, channels: of all of it, 0 where they change.
        packet: samples of its packets, but of the first and the last; 0 where they differ.
        whole: all of it could be decoded, and its clock has neither gaps nor jumps.
    """

    rate: int
    channels: int
    packet: int
    whole: bool


@lru_cache(maxsize=64)
def survey_of(path: Path, size: int, changed: int) -> Survey:
    rates: set[int] = set()
    channels: set[int] = set()
    counts: set[int] = set()  # of packets that have one before and one behind them
    before: int | None = None
    whole, seen, end = True, False, None
    with MediaFile(path) as source:
        times = SoundTimes(source)
        for packet in source.packets(source.need_sound()):
            for at, frame in times.decode(packet):
                whole = whole and (end is None or abs(at - end) <= _slack(frame.samples, frame.sample_rate))
                end = Fraction(frame.samples, frame.sample_rate) + (at if end is None else end)
                rates.add(frame.sample_rate)
                channels.add(frame.layout.nb_channels)
                counts |= set() if before is None else {before}
                before = frame.samples if seen else None
                seen = True
        whole = whole and not source.broken and not source.clock.jumps
    return Survey(_only(rates), _only(channels), _only(counts), whole)


def _only(values: set[int]) -> int:
    return next(iter(values)) if len(values) == 1 else 0
