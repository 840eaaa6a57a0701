# SPDX-License-Identifier: Apache-2.0
"""Sound of any file on its time line (`timeline.py`), mono, whole, in parts, or block by block in constant memory.

Sample n of a file is heard n / rate seconds after the beginning of its time line. What its clock leaves out is silence;
what cannot be decoded is, too.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.errors import UserError
from talkingdit.media.checks import existing_file
from talkingdit.media.container import MediaError, NoStreamError, Source
from talkingdit.media.timeline import UNEQUAL, SoundTimes, Timeline, compare, may_seek, timeline

Samples = NDArray[np.float32]

SPEECH_RATE = 16000  # Hz, of every waveform that enters a speech encoder
SILENCE_PEAK = 1e-4  # -80 dBFS
SHORTEST_AUDIO = 0.1  # seconds; less is not speech
SEEK_MARGIN = Fraction(1, 2)  # seconds before a part at which decoding begins: codecs need a packet or two to settle
EDGE = Fraction(1, 4)  # seconds beside a part that are converted with it, so that it has no edges of its own
SMALLEST_GAP, LARGEST_JITTER = Fraction(1, 100), Fraction(1, 25)  # seconds
GRID = Fraction(1, 500)  # seconds by which the clock of a container may be too coarse to tell a sample's place
LISTENED = 30  # seconds of sound by which it is decided how channels become one
CANCELLED = 0.01  # of the power of the channels: a mean of less has lost the voice

KINDS = {"u8": (128.0, 128.0), "s16": (0.0, 2.0**15), "s32": (0.0, 2.0**31), "s64": (0.0, 2.0**63)}  # zero, full scale


@dataclass(frozen=True)
class Piece:
    """Samples of a file as they were decoded.

    Args:
        at: seconds on the time line of the first one.
        rate: in Hz.
        samples: [n, channels].
    """

    at: Fraction
    rate: int
    samples: Samples


Mix = Callable[[Samples], Samples]


# ---- For callers -----------------------------------------------------------------------------------------------------


def sound_blocks(
    path: str | os.PathLike[str],
    rate: int | None = SPEECH_RATE,
    start: float | Fraction = 0,
    seconds: float | Fraction | None = None,
) -> Iterator[Samples]:
    """The sound of any file as mono float32 blocks [n], in constant memory: an hour is never held as a whole.

        for block in sound_blocks("voice.m4a"):
            ...  # about a second each; one after the other they are `read_audio("voice.m4a")`

    Args:
        path: WAV, FLAC, MP3, OGG, M4A, the sound of a video, or whatever else FFmpeg reads.
        rate: samples per second of the result; None keeps that of the file.
        start, seconds: only this part of its time line; less where it ends before. No more than that, and a second, is
            decoded. The part is the same samples as in the whole.

    Yields:
        Channels become one by their mean, the same for every container; where they cancel each other (antiphase), the
        loudest one is taken.

    Raises:
        UserError: no such file, empty, not a sound file, or not finite. `MediaWarning`s tell what is damaged.
    """
    source_path = existing_file(path, "audio")
    try:
        with Source(source_path) as source:
            pieces = _pieces(source, Fraction(start))
            first = next(pieces, None)
            if first is None:
                return
            mix = _mix_of(source_path, first)
            runs = _runs(_joined(itertools.chain([first], pieces), _begin(Fraction(start))), mix)
            target = first.rate if rate is None else rate
            total = 0
            for block in _cut(_at_rate(runs, target), target, Fraction(start), seconds):
                if not np.isfinite(block).all():
                    raise UserError(f"audio {str(source_path)!r}: expected finite samples, got NaN or infinity")
                total += len(block)
                yield block
            source.tell_broken("sound")
            if not start and seconds is None:
                stream = source.need_sound()
                heard = Fraction(total, target) - (timeline(source_path).sound or 0)
                compare(source, stream, heard, UNEQUAL, "sound")
    except NoStreamError as error:
        raise UserError(f"audio {str(source_path)!r}: expected a sound file, got {error}") from None
    except MediaError as error:
        raise UserError(
            f"audio {str(source_path)!r}: expected a WAV, FLAC, MP3 or OGG file, got one that cannot be decoded "
            f"({error})"
        ) from None


def read_audio(
    path: str | os.PathLike[str],
    rate: int = SPEECH_RATE,
    start: float | Fraction = 0,
    seconds: float | Fraction | None = None,
) -> Samples:
    """`sound_blocks` as one array, float32 [samples], which must be sound that a voice may be.

    Raises:
        UserError: as `sound_blocks`, or it has no samples, is shorter than 0.1 s, or silent.
    """
    samples = _whole(sound_blocks(path, rate, start, seconds))
    check_voice(path, len(samples), rate, float(np.abs(samples).max(initial=0)))
    return samples


def check_voice(path: str | os.PathLike[str], samples: int, rate: int, peak: float) -> None:
    """May this be a voice? For callers of `sound_blocks`, who count.

    Args:
        path: for the message.
        samples, rate: its length.
        peak: its largest absolute value.

    Raises:
        UserError: it has no samples, is shorter than 0.1 s, or silent.
    """
    where = f"audio {str(path)!r}"
    if not samples:
        raise UserError(f"{where}: expected sound, got a file without samples")
    if samples < SHORTEST_AUDIO * rate:
        raise UserError(f"{where}: expected at least {SHORTEST_AUDIO} s, got {samples / rate:.3f} s")
    if peak < SILENCE_PEAK:
        raise UserError(f"{where}: expected speech, got {samples / rate:.1f} s of silence")


def read_track(path: str | os.PathLike[str], start: float | Fraction = 0) -> tuple[Samples, int]:
    """The sound of a file from `start` on, float32 [samples] mono at its own rate, and that rate in Hz.

    Raises:
        UserError: as `sound_blocks`.
    """
    rate = sound_rate(path)
    return _whole(sound_blocks(path, rate, start)), rate


def sound_rate(path: str | os.PathLike[str]) -> int:
    """Samples per second of a sound file; raises as `sound_blocks`, and where there are none."""
    source_path = existing_file(path, "audio")
    try:
        with Source(source_path) as source:
            first = next(_pieces(source, Fraction(0)), None)
    except NoStreamError as error:
        raise UserError(f"audio {str(source_path)!r}: expected a sound file, got {error}") from None
    except MediaError as error:
        raise UserError(f"audio {str(source_path)!r}: expected a sound file, got one that is none ({error})") from None
    if first is None:
        raise UserError(f"audio {str(source_path)!r}: expected sound, got a file without samples")
    return first.rate


def _whole(blocks: Iterator[Samples]) -> Samples:
    return np.concatenate([np.zeros(0, np.float32), *blocks])


# ---- Decoding --------------------------------------------------------------------------------------------------------


def _begin(start: Fraction) -> Fraction:
    """Where on the line conversion begins for a part: at a whole second, where samples of all rates lie."""
    return Fraction(max(0, math.floor(start - EDGE)))


def _pieces(source: Source, start: Fraction) -> Iterator[Piece]:
    """What is decoded, from a little before `start` on."""
    import av

    source.need_sound()
    line = timeline(source.path)
    begin = _begin(start)
    if begin > SEEK_MARGIN and may_seek(source):
        try:
            source.seek(line.origin + begin - SEEK_MARGIN, source.need_sound())
            pieces = _placed(_decoded(source, line.origin), line, begin)
        except av.FFmpegError:
            pieces = None
        if pieces is not None:
            yield from pieces
            return
        source.rewind()
    yield from _decoded(source, line.origin)


def _decoded(source: Source, origin: Fraction) -> Iterator[Piece]:
    times = SoundTimes(source)
    for packet in source.packets(source.need_sound()):
        for at, frame in times.decode(packet):
            if frame.samples:
                yield Piece(at - origin, frame.sample_rate, as_floats(frame))


def _placed(pieces: Iterator[Piece], line: Timeline, wanted: Fraction) -> Iterator[Piece] | None:
    """Pieces behind a search, at the samples where they are in the whole; None where that is not known.

    The clocks of some containers tick in milliseconds. Packets of most codecs are equally long, so that a place is that
    of the first packet's end and a multiple of this length.
    """
    settled = list(itertools.islice(pieces, 4))[1:]
    if not settled or settled[0].at > wanted or line.sound is None:
        return None
    rate = settled[0].rate
    place = settled[0].at * rate
    if place.denominator != 1:
        count = len(settled[0].samples)
        if any(len(piece.samples) != count for piece in settled[:-1]):
            return None
        grid = round(line.sound * rate) + line.first_samples
        exact = grid + round((place - grid) / count) * count
        if abs(exact - place) > GRID * rate:
            return None
        shift = (exact - place) / rate
        return (Piece(p.at + shift, p.rate, p.samples) for p in itertools.chain(settled, pieces))
    return itertools.chain(settled, pieces)


def as_floats(frame: Any) -> Samples:
    """Decoded samples [n, channels], full scale at 1."""
    values = frame.to_ndarray()
    channels = frame.layout.nb_channels
    values = values.T if frame.format.is_planar else values.reshape(-1, channels)
    zero, full = KINDS.get(frame.format.name.removesuffix("p"), (0.0, 1.0))
    if full == 1.0:
        return np.ascontiguousarray(values, dtype=np.float32)
    return ((values.astype(np.float64) - zero) / full).astype(np.float32)


# ---- From pieces to a waveform ---------------------------------------------------------------------------------------


def _joined(pieces: Iterator[Piece], begin: Fraction) -> Iterator[Piece]:
    """Pieces without gaps from `begin` on: silence where the clock goes on without samples, overlaps left out.

    A difference of less than three quarters of a packet is jitter of the clock, and samples follow on each other.
    """
    end, first = begin, True
    for piece in pieces:
        samples, rate = piece.samples, piece.rate
        ahead = piece.at - end
        slack = min(max(Fraction(3 * len(samples), 4 * rate), SMALLEST_GAP), LARGEST_JITTER)
        if first or abs(ahead) > slack:
            missing = round(ahead * rate)
            for silence in _silence(missing, rate, samples.shape[1]):
                yield Piece(end, rate, silence)
            end += Fraction(max(missing, 0), rate)
            samples = samples[max(-missing, 0) :]
        if len(samples):
            first = False
            yield Piece(end, rate, samples)
            end += Fraction(len(samples), rate)


def _silence(count: int, rate: int, channels: int) -> Iterator[Samples]:
    for at in range(0, count, rate):
        yield np.zeros((min(rate, count - at), channels), np.float32)


def _runs(pieces: Iterator[Piece], mix: Mix) -> Iterator[tuple[int, Samples]]:
    """Mono blocks of about a second, and their rates."""
    parts: list[Samples] = []
    count, rate = 0, 0
    for piece in pieces:
        if parts and (piece.rate != rate or count >= rate):
            yield rate, np.concatenate(parts)
            parts, count = [], 0
        rate = piece.rate
        parts.append(mix(piece.samples))
        count += len(parts[-1])
    if parts:
        yield rate, np.concatenate(parts)


def _at_rate(runs: Iterator[tuple[int, Samples]], target: int) -> Iterator[Samples]:
    """Blocks at one rate; those that follow on each other are converted as one."""
    for rate, group in itertools.groupby(runs, key=lambda run: run[0]):
        if rate == target:
            yield from (samples for _, samples in group)
            continue
        import soxr

        stream = soxr.ResampleStream(rate, target, 1, dtype="float32")
        for _, samples in group:
            yield stream.resample_chunk(samples)
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _cut(
    blocks: Iterator[Samples], rate: int, start: Fraction, seconds: float | Fraction | None
) -> Iterator[Samples]:
    """The part that is wanted of blocks from `_begin(start)` on."""
    skip = round(start * rate) - int(_begin(start) * rate)
    left = None if seconds is None else round(seconds * rate)
    for block in blocks:
        part = block[skip:]
        skip = max(0, skip - len(block))
        if left is not None:
            part = part[:left]
            left -= len(part)
        if len(part):
            yield np.ascontiguousarray(part, dtype=np.float32)
        if left == 0:
            return


def _mix_of(path: Path, first: Piece) -> Mix:
    """How the channels of a file become one."""
    chosen = None
    if first.samples.shape[1] > 1:
        status = path.stat()
        chosen = _loudest(path, status.st_size, status.st_mtime_ns)

    def mix(samples: Samples) -> Samples:
        channels = samples.shape[1]
        return samples[:, 0] if channels == 1 else _mean(samples) if chosen is None else samples[:, chosen % channels]

    return mix


def _mean(samples: Samples) -> Samples:
    return samples.mean(axis=1, dtype=np.float32)


@lru_cache(maxsize=256)
def _loudest(path: Path, size: int, changed: int) -> int | None:
    """The loudest channel of a file whose channels cancel each other; None where their mean is good.

    It is found in the first half minute that is not silent.
    """
    power: Any = 0.0
    mean, heard = 0.0, Fraction(0)
    with Source(path) as source:
        for piece in _pieces(source, Fraction(0)):
            if np.abs(piece.samples).max() < SILENCE_PEAK or np.shape(power) not in ((), piece.samples.shape[1:]):
                continue
            power = power + np.square(piece.samples, dtype=np.float64).sum(axis=0)
            mean += float(np.square(_mean(piece.samples), dtype=np.float64).sum())
            heard += Fraction(len(piece.samples), piece.rate)
            if heard > LISTENED:
                break
    if not heard or not mean < CANCELLED * float(np.mean(power)):
        return None
    return int(np.argmax(power))
