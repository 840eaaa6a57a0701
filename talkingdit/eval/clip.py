# SPDX-License-Identifier: Apache-2.0
"""The videos that are judged: frames and sound of one clip on one time line, and of its truth at the same times."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
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
    """A whole video: upright, with square pixels.

    Raises:
        UserError: no such file, or not a video.
    """
    from talkingdit.media.files import read_video

    frames, sound, fps, rate = read_video(path)
    if not fps > 0:
        raise UserError(f"video {str(path)!r}: expected a frame rate, got none.")
    return EvalClip(frames, fps, None if sound is None else _at_rate(sound, rate), path.name)


def read_truth(path: Path, like: EvalClip) -> EvalClip:
    """The true video at the times of another's frames, whatever its own rate is; at most as many frames.

    Raises:
        UserError: no such file, or not a video.
    """
    from talkingdit.media.files import read_video
    from talkingdit.media.reader import read_pictures

    frames, sound, fps, rate = read_video(path)
    if abs(fps - like.fps) > 0.01 * like.fps:
        del frames
        from talkingdit.media.timeline import timeline

        begin = timeline(path).pictures or Fraction(0)
        step = 1 / Fraction(like.fps).limit_denominator(1001)
        wanted = (begin + i * step for i in range(len(like.frames)))
        taken = [frame.copy() for frame in read_pictures(path, wanted)]
        if not taken:
            raise UserError(f"video {str(path)!r}: expected a video, got a file without frames")
        frames = np.stack(list(itertools.islice(taken, len(like.frames))))
    return EvalClip(frames[: len(like.frames)], like.fps, None if sound is None else _at_rate(sound, rate), path.name)


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
