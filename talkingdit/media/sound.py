# SPDX-License-Identifier: Apache-2.0
"""Sound of any file, mono, whole or in parts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from talkingdit.errors import UserError
from talkingdit.media.checks import existing_file, reason_of
from talkingdit.media.opening import open_media

SPEECH_RATE = 16000  # Hz, of every waveform that enters a speech encoder
SILENCE_PEAK = 1e-4  # -80 dBFS
SHORTEST_AUDIO = 0.1  # seconds; less is not speech
SEEK_MARGIN = 0.5  # seconds before a part at which decoding begins: codecs need a packet or two to settle


def read_audio(
    path: str | os.PathLike[str], rate: int = SPEECH_RATE, start: float = 0.0, seconds: float | None = None
) -> np.ndarray:
    """Read any sound file (WAV, FLAC, MP3, OGG, M4A, or the sound of a video) as mono at the given rate.

    Args:
        path: the file.
        rate: samples per second.
        start, seconds: only this part of it; less where it ends before. No more than that is decoded.

    Returns:
        float32 [samples]; channels are averaged, the beginning of the file, or of the part, is sample 0.

    Raises:
        UserError: no such file, empty, not a sound file, shorter than 0.1 s, not finite, or silent.
    """
    source = existing_file(path, "audio")
    samples, found = decode_audio(source, start, seconds)
    if samples.size == 0:
        raise UserError(f"audio {str(source)!r}: expected sound, got a file without samples")
    if not np.isfinite(samples).all():
        raise UserError(f"audio {str(source)!r}: expected finite samples, got NaN or infinity")
    if len(samples) < SHORTEST_AUDIO * found:
        raise UserError(
            f"audio {str(source)!r}: expected at least {SHORTEST_AUDIO} s, got {len(samples) / found:.3f} s"
        )
    if float(np.abs(samples).max()) < SILENCE_PEAK:
        raise UserError(f"audio {str(source)!r}: expected speech, got {len(samples) / found:.1f} s of silence")
    if found != rate:
        import soxr

        samples = soxr.resample(samples, found, rate)
    return np.ascontiguousarray(samples, dtype=np.float32)


def read_track(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """A sound file as it is: float32 [samples] mono at its own rate, and that rate in Hz.

    Raises:
        UserError: no such file, empty, or not a sound file.
    """
    return decode_audio(existing_file(path, "audio"))


def decode_audio(source: Path, start: float = 0.0, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """Samples [n] float32 mono at the file's own rate, and that rate."""
    import soundfile

    # soundfile reads WAV, FLAC, OGG and MP3 exactly from the first sample; FFmpeg knows the rest.
    try:
        with soundfile.SoundFile(source) as file:
            rate = int(file.samplerate)
            first = min(round(start * rate), file.frames)
            before = file.seek(max(0, first - round(SEEK_MARGIN * rate)))
            count = -1 if seconds is None else first - before + round(seconds * rate)
            data = file.read(count, dtype="float32", always_2d=True)[first - before :]
        return data.mean(axis=1), rate
    except soundfile.LibsndfileError:
        return decode_with_av(source, start, seconds)


def _frames_from(container: Any, stream: Any, start: float) -> Iterator[Any]:
    """Frames of a track from a little before `start` seconds on; all of them where a file cannot be searched."""
    if start > SEEK_MARGIN:
        container.seek(int((start - SEEK_MARGIN) * 1e6))
        frames = container.decode(stream)
        frame = next(frames, None)
        if frame is not None and frame.time is not None and frame.time <= start:
            yield frame
            yield from frames
            return
        container.seek(0)
    yield from container.decode(stream)


def decode_with_av(source: Path, start: float = 0.0, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """As `decode_audio`, of what only FFmpeg can read: the sound of videos, M4A."""
    import av

    try:
        with open_media(source) as container:
            if not container.streams.audio:
                raise UserError(f"audio {str(source)!r}: expected a sound file, got a file without an audio stream")
            stream = container.streams.audio[0]
            rate = int(stream.rate)
            resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
            parts: list[np.ndarray] = []
            begins: float | None = None
            first = round(start * rate)
            end = None if seconds is None else first + round(seconds * rate)
            for frame in _frames_from(container, stream, start):
                if begins is None:
                    begins = frame.time or 0.0
                parts += [part.to_ndarray().reshape(-1) for part in resampler.resample(frame)]
                if end is not None and frame.time is not None and round(frame.time * rate) >= end:
                    break
            parts += [part.to_ndarray().reshape(-1) for part in resampler.resample(None)]
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"audio {str(source)!r}: expected a WAV, FLAC, MP3 or OGG file, got one that cannot be decoded "
            f"({reason_of(error)})"
        ) from None
    samples = np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)
    # Priming samples carry a time before zero, late streams one after it: sample 0 is time `start` either way.
    offset = round((begins or 0.0) * rate) - first
    samples = samples[-offset:] if offset < 0 else np.pad(samples, (offset, 0))
    return (samples if end is None else samples[: end - first]), rate
