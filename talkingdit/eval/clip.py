# SPDX-License-Identifier: Apache-2.0
"""The videos that are judged: frames and sound of one clip on one time line, and of its truth at the same times."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from talkingdit.errors import UserError
from talkingdit.media.sound import SPEECH_RATE

Frames = npt.NDArray[np.uint8]
Sound = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EvalClip:
    """One video in memory.

    Attributes:
        frames: uint8 [F, H, W, 3] RGB.
        fps: frames per second.
        sound: float32 [samples] mono at 16 kHz from the time of frame 0 on; None without a sound track.
        name: for messages and reports.
    """

    frames: Frames
    fps: float
    sound: Sound | None
    name: str

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.fps


def read_clip(path: Path) -> EvalClip:
    """A whole video: upright, with square pixels, and as many frames in each second of it.

    Where the frames of a file do not follow each other evenly (recordings of phones and screens), those are taken that
    are shown at even times, at the file's mean rate.

    Raises:
        UserError: no such file, or not a video.
    """
    from talkingdit.media.files import read_video

    frames, sound, fps, rate = read_video(path)
    if not fps > 0:
        raise UserError(f"video {str(path)!r}: expected a frame rate, got none.")
    if not is_even(path):
        del frames
        frames = _frames_at(path, fps, None)
    return EvalClip(frames, fps, None if sound is None else _at_rate(sound, rate), path.name)


def read_truth(path: Path, like: EvalClip) -> EvalClip:
    """The true video at the times of another's frames, whatever its own rate is; at most as many frames.

    Raises:
        UserError: no such file, or not a video.
    """
    from talkingdit.media.files import read_video

    frames, sound, fps, rate = read_video(path)
    if not in_step(fps, like.fps, len(like.frames)) or not is_even(path):
        del frames
        frames = _frames_at(path, like.fps, len(like.frames))
    return EvalClip(frames[: len(like.frames)], like.fps, None if sound is None else _at_rate(sound, rate), path.name)


def read_first(path: Path, count: int, name: str) -> EvalClip:
    """The first frames of a file as they follow each other, whenever they are shown; without sound.

    Raises:
        UserError: no such file, or not a video.
    """
    from talkingdit.media.checks import existing_file
    from talkingdit.media.container import MediaError
    from talkingdit.media.reader import all_pictures

    try:
        frames = list(itertools.islice(all_pictures(existing_file(path, "video")), count))
    except MediaError as error:
        raise UserError(f"video {str(path)!r}: expected a video, got a file that cannot be decoded ({error})") from None
    if not frames:
        raise UserError(f"video {str(path)!r}: expected a video, got a file without frames")
    return EvalClip(np.stack(frames), 1.0, None, name)


def in_step(fps: float | Fraction, other: float | Fraction, frames: int) -> bool:
    """Is the i-th frame at one rate shown with the i-th at another, for so many frames, to half a frame?"""
    return frames * abs(float(fps) - float(other)) < float(fps) / 2


def is_even(path: Path) -> bool:
    """Do the frames of a file follow each other evenly, to half a frame? By the times of its packets alone.

    Raises:
        UserError: it cannot be read.
    """
    status = path.stat()
    return _is_even(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _is_even(path: Path, size: int, changed: int) -> bool:
    from talkingdit.media.container import MediaError, MediaFile

    try:
        with MediaFile(path) as source:
            stream = source.need_pictures()
            rate = stream.average_rate or stream.base_rate
            if not rate or source.container.format.name == "avi":  # whose packets have no times of pictures
                return True
            stamps = [packet.pts for packet in source.packets(stream) if packet.size and not packet.is_discard]
            tick = float(stream.time_base)
    except MediaError as error:
        raise UserError(f"video {str(path)!r}: expected a video, got a file that cannot be decoded ({error})") from None
    if any(stamp is None for stamp in stamps) or len(stamps) < 2:
        return True
    at: npt.NDArray[np.float64] = np.sort(np.asarray(stamps, np.float64)) * (tick * float(rate))
    return bool(np.abs(at - at[0] - np.arange(len(at))).max() <= 0.5)


def _frames_at(path: Path, fps: float, most: int | None) -> Frames:
    """Frames at even times from the first one on, at most so many: uint8 [F, H, W, 3]."""
    from talkingdit.media.reader import read_pictures
    from talkingdit.media.timeline import timeline

    begin = timeline(path).pictures or Fraction(0)
    step = 1 / Fraction(fps).limit_denominator(1001)
    wanted = (begin + i * step for i in itertools.count())
    taken = [frame.copy() for frame in itertools.islice(read_pictures(path, wanted), most)]
    if not taken:
        raise UserError(f"video {str(path)!r}: expected a video, got a file without frames")
    return np.stack(taken)


def _at_rate(sound: npt.NDArray[np.float32], rate: int) -> Sound:
    if rate == SPEECH_RATE:
        return np.asarray(sound, np.float32)
    import soxr

    return np.asarray(soxr.resample(sound, rate, SPEECH_RATE), np.float32)


def envelope(clip: EvalClip, frames: int) -> npt.NDArray[np.float64]:
    """Loudness of the sound during each of so many frames, as root mean square: [frames]; 0 behind its end."""
    sound = np.zeros(0, np.float32) if clip.sound is None else clip.sound
    levels = np.zeros(frames)
    for i in range(frames):
        part = sound[round(i * SPEECH_RATE / clip.fps) : round((i + 1) * SPEECH_RATE / clip.fps)].astype(np.float64)
        levels[i] = np.sqrt(np.mean(part**2)) if len(part) else 0.0
    return levels
