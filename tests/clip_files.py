# SPDX-License-Identifier: Apache-2.0
"""Small media files of known content. Picture k of a video has the brightness `brightness(k)`, and a moving blob."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

RATE = 16000


def brightness(k: int | np.ndarray) -> np.ndarray:
    """Grey level of picture k: neighbours differ by far more than a codec changes."""
    return np.asarray(24 + 8 * (np.asarray(k) * 11 % 27))


def draw(frames: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Pictures [frames, *size, 3]: a grey that tells the number, and a square that moves."""
    height, width = size
    pictures = np.repeat(brightness(np.arange(frames))[:, None, None, None], 3, axis=3)
    pictures = np.broadcast_to(pictures, (frames, height, width, 3)).astype(np.uint8).copy()
    for k, picture in enumerate(pictures):
        x = k % (width - 8)
        picture[height // 4 : height // 4 + 8, x : x + 8] = (250, 40, 40)
    return pictures


def number_of(picture: np.ndarray) -> int:
    """Which picture of `draw` this is, of the first 27, from the grey of its lower half."""
    grey = np.median(picture[picture.shape[0] // 2 :])
    return int(np.argmin(np.abs(brightness(np.arange(27)) - grey)))


def voice(seconds: float) -> np.ndarray:
    """A sound of changing pitch and loudness, so that no two moments are the same."""
    t = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * (150 * t + 40 * t**2)) * (0.5 + 0.5 * np.sin(7 * t))).astype(np.float32)


def write_video(
    path: Path,
    pictures: np.ndarray,
    fps: Fraction | float = 16,
    sound: np.ndarray | None = None,
    times: list[float] | None = None,
    group: int = 10,
    front: bool = True,
) -> Path:
    """A file with key frames every `group` pictures, at a constant rate or at the given times in seconds."""
    rate = Fraction(fps).limit_denominator(1001)
    options = {"movflags": "+faststart"} if front and path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        stream.options = {"crf": "10", "g": str(group), "preset": "ultrafast", "bf": "2"}
        track = None
        if sound is not None:
            track = container.add_stream("aac", rate=RATE)
            track.layout, track.format = "mono", "fltp"
        base = Fraction(1, 1000) if times is not None else 1 / rate
        if times is not None:
            stream.codec_context.time_base = base
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number if times is None else round(times[number] * 1000)
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None and sound is not None:
            for at in range(0, len(sound), 1024):
                piece = av.AudioFrame.from_ndarray(sound[None, at : at + 1024].copy(), format="fltp", layout="mono")
                piece.sample_rate, piece.pts, piece.time_base = RATE, at, Fraction(1, RATE)
                container.mux(track.encode(piece))
            container.mux(track.encode(None))
    return path


def write_lossless(path: Path, pictures: np.ndarray, fps: int) -> Path:
    """A file of pictures uint8 [n, H, W, 3] that are read back as they are."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "bgr0"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_voice(path: Path, seconds: float) -> Path:
    soundfile.write(path, voice(seconds), RATE)
    return path


def truncate(path: Path, share: float = 0.5) -> Path:
    """The beginning of a file; with the index in front it still opens."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path
