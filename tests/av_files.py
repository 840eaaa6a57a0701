# SPDX-License-Identifier: Apache-2.0
"""Media files as they come: any container and codec, clocks that begin anywhere, gaps, odd headers.

A video of `write_av` is dark but for one picture, and silent but for one beep, which belong together.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FPS = 25


def speech(seconds: float, rate: int) -> np.ndarray:
    """Sound of changing pitch and loudness, no two moments of which are the same; float32 [samples]."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (200 * t + 60 * t**2)) * (0.6 + 0.4 * np.sin(9 * t))).astype(np.float32)


def beeping(seconds: float, rate: int, at: float) -> np.ndarray:
    """Silence but for a beep of 40 ms."""
    wave = np.zeros(round(seconds * rate), np.float32)
    first = round(at * rate)
    wave[first : first + rate // 25] = 0.8 * np.sin(np.arange(rate // 25) * 2 * np.pi * 1000 / rate)
    return wave


def onset(wave: np.ndarray, rate: int) -> float:
    """When it becomes loud, in seconds."""
    return float(np.flatnonzero(np.abs(wave) > 0.3 * np.abs(wave).max())[0]) / rate


class Pipe(io.RawIOBase):
    """Writes a file as a pipe is written: what stands in it is never mended."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def write(self, data: object) -> int:
        return self.file.write(data)  # type: ignore[arg-type]

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self.file.close()
        super().close()


class Sound:
    """Encodes sound into a container, some of its packets left out."""

    def __init__(
        self,
        container: av.container.OutputContainer,
        codec: str,
        rate: int,
        layout: str = "mono",
        lost: tuple[float, float] | None = None,
        begin: float = 0,
        options: dict[str, str] | None = None,
    ) -> None:
        self.container, self.rate, self.layout, self.lost = container, rate, layout, lost
        self.stream = container.add_stream(codec, rate=rate)
        self.stream.layout = layout
        self.stream.options = options or {}
        self.begin = round(begin * rate)
        form = self.stream.codec_context.codec.audio_formats[0].name
        self.resampler = av.AudioResampler(format=form, layout=layout, rate=rate)
        self.sent = 0

    def send(self, wave: np.ndarray) -> None:
        """The next samples, [n] or [channels, n]."""
        planes = np.ascontiguousarray(wave if wave.ndim == 2 else wave[None])
        for at in range(0, planes.shape[1], 1024):
            part = np.ascontiguousarray(planes[:, at : at + 1024])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=self.layout)
            frame.sample_rate, frame.pts = self.rate, self.begin + self.sent + at
            frame.time_base = Fraction(1, self.rate)
            for piece in self.resampler.resample(frame):
                self._mux(self.stream.encode(piece))
        self.sent += planes.shape[1]

    def close(self) -> None:
        for piece in self.resampler.resample(None):
            self._mux(self.stream.encode(piece))
        self._mux(self.stream.encode(None))

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            at = packet.pts * packet.time_base if packet.pts is not None else None
            if at is None or self.lost is None or not self.lost[0] <= at < self.lost[1]:
                self.container.mux(packet)


def write_sound(
    path: Path,
    wave: np.ndarray,
    rate: int,
    codec: str,
    form: str | None = None,
    layout: str = "mono",
    lost: tuple[float, float] | None = None,
    begin: float = 0,
    muxer: dict[str, str] | None = None,
    encoder: dict[str, str] | None = None,
    pipe: bool = False,
) -> Path:
    """A file with sound alone.

    Args:
        wave: [samples] or [channels, samples].
        form: name of the container, where the path does not say.
        lost: packets between these seconds are left out.
        begin: its clock's time at the beginning, in seconds.
        muxer, encoder: options.
        pipe: it is written without going back.
    """
    target = Pipe(path) if pipe else str(path)
    with av.open(target, "w", format=form, options=muxer or {}) as container:
        sound = Sound(container, codec, rate, layout, lost, begin, encoder)
        sound.send(wave)
        sound.close()
    if isinstance(target, Pipe):
        target.close()
    return path


def write_av(
    path: Path,
    codecs: tuple[str, str],
    rate: int = 16000,
    pictures: int = 50,
    flash: int = 25,
    begin: float = 0,
    early: float = 0,
    lost: tuple[float, float] | None = None,
    shown: Sequence[float] | None = None,
    muxer: dict[str, str] | None = None,
    size: tuple[int, int] = (48, 64),
    group: int = 12,
) -> Path:
    """A video of 25 pictures per second in which picture `flash` is bright, while a beep is heard.

    Args:
        codecs: of pictures and sound.
        begin: its clock's time at the first picture, in seconds.
        early: seconds by which the sound begins before the pictures; negative: after.
        lost: packets of sound between these seconds are left out.
        shown: when pictures are shown, in seconds after the first one, at any rate.
        muxer: options.
    """
    times = [k / FPS for k in range(pictures)] if shown is None else list(shown)
    length = times[-1] + 1 / FPS
    wave = beeping(length + early, rate, times[flash] + early)
    with av.open(str(path), "w", options=muxer or {}) as container:
        video = container.add_stream(codecs[0], rate=FPS)
        video.height, video.width, video.pix_fmt = *size, "yuv420p"
        video.options = {"g": str(group), "threads": "1"}
        if codecs[0] == "libx264":
            video.options |= {"bf": "2", "preset": "ultrafast"}
        base = Fraction(1, FPS) if shown is None else Fraction(1, 1000)
        video.codec_context.time_base = base
        sound = Sound(container, codecs[1], rate, lost=lost, begin=begin - early)
        for number, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(
                np.full((*size, 3), 235 if number == flash else 20, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = round((begin + at) / base), base
            container.mux(video.encode(frame))
            sound.send(wave[sound.sent : round((at + early + 1 / FPS) * rate)])
        container.mux(video.encode(None))
        sound.send(wave[sound.sent :])
        sound.close()
    return path
