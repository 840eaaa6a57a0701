# SPDX-License-Identifier: Apache-2.0
"""Sound of any file on its time line (`timeline.py`), mono, whole, in parts, or block by block in constant memory.

Sample n of a file is heard n / rate seconds after the beginning of its time line. What its clock leaves out is silence;
what cannot be decoded is, too.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from talkingdit.errors import UserError
from talkingdit.media.checks import existing_file
from talkingdit.media.container import MediaError, MediaFile, NoStreamError
from talkingdit.media.decoding import (
    Samples,
    SoundPiece,
    Survey,
    behind,
    conversion_start,
    joined,
    pieces_from,
    survey_of,
)
from talkingdit.media.timeline import UNEQUAL, compare, timeline

SPEECH_RATE = 16000  # Hz, of every waveform that enters a speech encoder
SILENCE_PEAK = 1e-4  # -80 dBFS
SHORTEST_AUDIO = 0.1  # seconds; less is not speech
LISTENED = 30  # seconds of sound by which it is decided how channels become one
SLOWEST, FASTEST = 1000, 1_000_000  # samples per second of a recording
LOUDEST = 100  # times full scale; more are floats that mean something else
CANCELLED = 0.01  # of the power of the channels: a mean of less has lost the voice

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
    for block in _blocks(path, rate, start, seconds, _mix_of):
        yield block[:, 0]


def channel_blocks(
    path: str | os.PathLike[str], rate: int | None = None, start: float | Fraction = 0
) -> Iterator[Samples]:
    """As `sound_blocks`, all channels of the file: blocks [n, channels]."""
    return _blocks(path, rate, start, None, _keep_of)


def _blocks(
    path: str | os.PathLike[str],
    rate: int | None,
    start: float | Fraction,
    seconds: float | Fraction | None,
    mix_of: Callable[[Path, SoundPiece], Mix],
) -> Iterator[Samples]:
    file, start = existing_file(path, "audio"), Fraction(start)
    with _worded(file), MediaFile(file) as source:
        begin, pieces = pieces_from(source, start)
        first = next(pieces, None)
        _check_first(file, source, first)
        if first is None:
            return
        mix, target = mix_of(file, first), first.rate if rate is None else rate
        run = behind(joined(itertools.chain([first], pieces), begin), conversion_start(start))
        runs = _runs(run, mix)
        total = 0
        for block in _cut(_at_rate(runs, target), target, start, seconds):
            if not np.isfinite(block).all():
                raise UserError(f"audio {str(file)!r}: expected finite samples, got NaN or infinity")
            if (peak := float(np.abs(block).max(initial=0))) > LOUDEST:
                raise UserError(
                    f"audio {str(file)!r}: expected samples from -1 to 1, got one of {peak:.6g}; divide them by what "
                    "full scale is, 32768 for 16 bits"
                )
            total += len(block)
            yield block
        source.tell_broken("sound")
        if not start and seconds is None:
            heard = Fraction(total, target) - (timeline(file).sound or 0)
            compare(source, source.need_sound(), heard, UNEQUAL, "sound")


def _check_first(file: Path, source: MediaFile, first: SoundPiece | None) -> None:
    """Does the first that was decoded belong to a recording? Raises UserError."""
    if first is None and source.broken:
        raise UserError(f"audio {str(file)!r}: expected sound, got {source.undecoded(source.need_sound())}")
    if first is not None and not SLOWEST <= first.rate <= FASTEST:
        raise UserError(
            f"audio {str(file)!r}: expected {SLOWEST} to {FASTEST} samples per second, got {first.rate}; the header "
            "of the file is damaged, or it is no recording"
        )


@contextmanager
def _worded(file: Path) -> Iterator[None]:
    """Makes what is wrong with a file one sentence for a person."""
    try:
        yield
    except NoStreamError as error:
        raise UserError(f"audio {str(file)!r}: expected a sound file, got {error}") from None
    except MediaError as error:
        raise UserError(
            f"audio {str(file)!r}: expected a WAV, FLAC, MP3 or OGG file, got one that cannot be decoded ({error})"
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
    rate, _ = sound_form(path)
    return _whole(sound_blocks(path, rate, start)), rate


def sound_form(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Samples per second and channels of a sound file; raises as `sound_blocks`, and where there are no samples."""
    file = existing_file(path, "audio")
    with _worded(file), MediaFile(file) as source:
        first = next(pieces_from(source, Fraction(0))[1], None)
        _check_first(file, source, first)
    if first is None:
        raise UserError(f"audio {str(file)!r}: expected sound, got a file without samples")
    return first.rate, first.samples.shape[1]


def _whole(blocks: Iterator[Samples]) -> Samples:
    return np.concatenate([np.zeros(0, np.float32), *blocks])


def survey(path: str | os.PathLike[str]) -> Survey:
    """Decode the sound of a file to see what it is; raises as `sound_blocks`."""
    file = existing_file(path, "audio")
    status = file.stat()
    with _worded(file):
        return survey_of(file, status.st_size, status.st_mtime_ns)


# ---- From pieces to a waveform ---------------------------------------------------------------------------------------


def _runs(pieces: Iterator[SoundPiece], mix: Mix) -> Iterator[tuple[int, Samples]]:
    """Mixed blocks [n, channels] of about a second, and their rates."""
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

        stream = None
        for _, samples in group:
            if stream is None:
                channels = samples.shape[1]
                stream = soxr.ResampleStream(rate, target, channels, dtype="float32")
            yield stream.resample_chunk(samples)
        if stream is not None:
            yield stream.resample_chunk(np.zeros((0, channels), np.float32), last=True)


def _cut(blocks: Iterator[Samples], rate: int, start: Fraction, seconds: float | Fraction | None) -> Iterator[Samples]:
    """The part that is wanted of blocks from `conversion_start(start)` on."""
    skip = round(start * rate) - int(conversion_start(start) * rate)
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


def _mix_of(path: Path, first: SoundPiece) -> Mix:
    """How the channels of a file become one."""
    chosen = None
    if first.samples.shape[1] > 1:
        status = path.stat()
        chosen = _loudest(path, status.st_size, status.st_mtime_ns)

    def mix(samples: Samples) -> Samples:
        if chosen is None or samples.shape[1] == 1:
            return _mean(samples)
        return samples[:, chosen % samples.shape[1], None]

    return mix


def _keep_of(path: Path, first: SoundPiece) -> Mix:
    """As many channels as the beginning of the file has."""
    wanted = first.samples.shape[1]

    def mix(samples: Samples) -> Samples:
        return samples if samples.shape[1] == wanted else _mean(samples).repeat(wanted, axis=1)

    return mix


def _mean(samples: Samples) -> Samples:
    return samples if samples.shape[1] == 1 else samples.mean(axis=1, keepdims=True, dtype=np.float32)


@lru_cache(maxsize=256)
def _loudest(path: Path, size: int, changed: int) -> int | None:
    """The loudest channel of a file whose channels cancel each other; None where their mean is good.

    It is found in the first half minute that is not silent.
    """
    power: Any = 0.0
    mean, heard = 0.0, Fraction(0)
    with MediaFile(path) as source:
        for piece in pieces_from(source, Fraction(0))[1]:
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
