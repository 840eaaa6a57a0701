# SPDX-License-Identifier: Apache-2.0
"""The sound track of a video that is written: the given file as it is, or encoded with all its channels.

Packets of a file that is whole, and whose codec an MP4 may hold, are copied, so that nothing is lost. Everything else
(WAV, files with gaps, arrays) is encoded: mono and stereo as AAC, more channels as FLAC, whose channels do not depend
on where a loudspeaker stands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from talkingdit.errors import UserError
from talkingdit.media.checks import existing_file
from talkingdit.media.container import MediaFile
from talkingdit.media.decoding import Samples, Survey, exact_place
from talkingdit.media.sound import SPEECH_RATE, channel_blocks, sound_form, survey
from talkingdit.media.timeline import timeline

AAC_FRAME = 1024  # samples of one AAC packet, and the encoder's priming
AAC_RATES = (SPEECH_RATE, 22050, 24000, 32000, 44100, 48000)
BITS_PER_CHANNEL = 128_000  # per second
MOST_CHANNELS = 8  # of FLAC
COPIED = ("aac", "mp3", "ac3", "eac3", "alac", "opus", "flac")  # what an MP4 may hold and FFmpeg writes
LOWEST_MP3 = 16000  # Hz, in an MP4
SETTLE = Fraction(1, 10)  # seconds of sound kept, and not played, before a beginning: decoders need them to start


@runtime_checkable
class SoundTrack(Protocol):
    """Sound that is written beside pictures."""

    def add_to(self, container: Any) -> None:
        """Make the stream; before the first packet of any."""

    def send(self, until: Fraction, last: bool) -> None:
        """Write the sound up to a time of the video in seconds, in whole packets unless it is the last."""

    def close(self) -> None:
        """Close what is read from."""


def open_track(audio: np.ndarray | str | os.PathLike[str], rate: int, skip: Fraction, video: Path) -> SoundTrack:
    """A track for a video.

    Args:
        audio: float [samples] mono, or a sound file.
        rate: of an array, in Hz.
        skip: seconds of a file that are left out at its beginning.
        video: for messages.

    Raises:
        UserError: an array is not finite or has another shape, the rate is impossible, or the file is not good.
    """
    if isinstance(audio, (str, os.PathLike)):
        file = existing_file(audio, "audio")
        found = survey(file)
        if may_copy(file, found):
            return CopiedTrack(file, found, skip)
        rate, channels = sound_form(file)
        target = _aac_rate(rate)
        return EncodedTrack(channel_blocks(file, target, skip), target, channels)
    samples = np.asarray(audio, dtype=np.float32)
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise UserError(
            f"video {str(video)!r}: audio must be finite [samples] and not empty, got shape {samples.shape}"
        )
    if rate < 1:
        raise UserError(f"video {str(video)!r}: the rate of the audio must be positive, got {rate}")
    target = _aac_rate(rate)
    if target != rate:
        import soxr

        samples = soxr.resample(samples, rate, target)
    return EncodedTrack(iter([samples[:, None]]), target, 1)


def may_copy(file: Path, found: Survey) -> bool:
    """May the packets of a sound file be taken into an MP4 as they are?"""
    if not (found.whole and found.rate and found.channels):
        return False
    with MediaFile(file) as source:
        codec = source.need_sound().codec_context.codec.canonical_name
    return codec in COPIED and (codec != "mp3" or found.rate >= LOWEST_MP3)


def _aac_rate(rate: int) -> int:
    return rate if rate in AAC_RATES else next((r for r in AAC_RATES if r > rate), AAC_RATES[-1])


class EncodedTrack:
    """Blocks of sound, cut or filled with silence to the length of the video.

    Args:
        blocks: [n, channels] float32, full scale at 1.
        rate: that AAC knows.
        channels: more than eight become one.
    """

    def __init__(self, blocks: Iterator[Samples], rate: int, channels: int) -> None:
        self._blocks, self._rate = blocks, rate
        self._channels = channels if channels <= MOST_CHANNELS else 1
        self._held = np.zeros((0, self._channels), np.float32)
        self._sent = 0

    def add_to(self, container: Any) -> None:
        few = self._channels <= 2
        self._container = container
        self._stream = container.add_stream("aac" if few else "flac", rate=self._rate)
        self._stream.layout, self._stream.format = _layout(self._channels), "fltp" if few else "s16"
        if few:
            self._stream.bit_rate = BITS_PER_CHANNEL * self._channels

    def send(self, until: Fraction, last: bool) -> None:
        import av

        end = round(until * self._rate)
        while self._sent < end and (last or end - self._sent >= AAC_FRAME):
            count = min(AAC_FRAME, end - self._sent)
            samples = self._next(count).clip(-1, 1)
            if self._channels <= 2:
                piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), "fltp", _layout(self._channels))
            else:
                values = np.rint(samples * (2**15 - 1)).astype(np.int16).reshape(1, -1)
                piece = av.AudioFrame.from_ndarray(values, "s16", _layout(self._channels))
            piece.sample_rate, piece.pts, piece.time_base = self._rate, self._sent, Fraction(1, self._rate)
            self._container.mux(self._stream.encode(piece))
            self._sent += count
        if last:
            self._container.mux(self._stream.encode(None))

    def _next(self, count: int) -> Samples:
        """The next samples [count, channels], silence behind the end."""
        parts = [self._held] if len(self._held) else []
        missing = count - len(self._held)
        while missing > 0:
            block = next(self._blocks, None)
            if block is None:
                block = np.zeros((missing, self._channels), np.float32)
            elif block.shape[1] != self._channels:
                block = block.mean(axis=1, keepdims=True, dtype=np.float32)
            parts.append(block)
            missing -= len(block)
        samples = np.concatenate(parts) if len(parts) > 1 else parts[0]  # one block may be the sound of hours: no copy
        self._held = samples[count:]
        return samples[:count]

    def close(self) -> None:
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()


def _layout(channels: int) -> str:
    return {1: "mono", 2: "stereo"}.get(channels, f"{channels}c")


class CopiedTrack:
    """The packets of a sound file. The track ends with the file, or the packet in which the video ends.

    Args:
        file: whose packets `may_copy`.
        found: its survey.
        skip: seconds left out at the beginning. The first packets are kept as far as decoders need them, and marked as
            not to be played.
    """

    def __init__(self, file: Path, found: Survey, skip: Fraction) -> None:
        self._found, self._line = found, timeline(file)
        self._skip = skip
        self._source = MediaFile(file)
        self._packets = self._source.packets(self._source.need_sound())
        self._held: Any = None

    def add_to(self, container: Any) -> None:
        self._container = container
        self._stream = container.add_stream_from_template(self._source.need_sound())

    def send(self, until: Fraction, last: bool) -> None:
        rate = self._found.rate
        while True:
            packet = self._held if self._held is not None else next(self._packets, None)
            self._held = None
            if packet is None or not packet.size:
                return
            begin, lasts = self._place(packet), round((packet.duration or 0) * packet.time_base * rate)
            if begin + lasts <= -SETTLE * rate:
                continue
            if begin >= round(until * rate):
                self._held = packet
                return
            if last:
                lasts = min(lasts, round(until * rate) - begin)
            packet.time_base = Fraction(1, rate)
            packet.pts = packet.dts = begin
            packet.duration = lasts
            packet.stream = self._stream
            self._container.mux(packet)

    def _place(self, packet: Any) -> int:
        """The first sample of a packet, counted from the beginning of the video."""
        stamp = packet.pts if packet.pts is not None else packet.dts
        near = (stamp * packet.time_base - self._line.origin) * self._found.rate
        exact = exact_place(near, self._line, self._found.rate, self._found.packet, packet.time_base)
        return (round(near) if exact is None else exact) - round(self._skip * self._found.rate)

    def close(self) -> None:
        self._source.close()
