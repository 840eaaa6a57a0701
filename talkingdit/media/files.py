# SPDX-License-Identifier: Apache-2.0
"""Sound, images and video files: read what people have, write what every player plays.

Everything a user may hand over is checked here, and every complaint is a `UserError` of one sentence. Sound is read in
`sound.py`, images in `image.py`, videos are written in `writer.py`; all of it can be had from here.
"""

from __future__ import annotations

import os

import numpy as np

from talkingdit.errors import UserError
from talkingdit.media.checks import existing_file
from talkingdit.media.container import MediaError, MediaFile, NoStreamError
from talkingdit.media.image import read_image
from talkingdit.media.reader import all_pictures, timed_pictures
from talkingdit.media.sound import SPEECH_RATE, read_audio, read_track, sound_blocks
from talkingdit.media.targets import check_writable
from talkingdit.media.timeline import timeline
from talkingdit.media.writer import VideoWriter

__all__ = [
    "SPEECH_RATE",
    "VideoWriter",
    "check_writable",
    "read_audio",
    "read_image",
    "read_track",
    "read_video",
    "sound_blocks",
]


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray | None, float, int]:
    """Read a whole video into memory: upright, with square pixels.

    Returns:
        frames uint8 [F, H, W, 3] RGB; sound float32 [samples] mono from the time of frame 0 on, or None; frames per
        second; rate of the sound in Hz (0 without sound).

    Raises:
        UserError: no such file, or not a video.
    """
    source = existing_file(path, "video")
    try:
        with MediaFile(source) as opened:
            stream = opened.need_pictures()
            fps = float(stream.average_rate or stream.base_rate or 0)
            has_sound = opened.sound is not None
            broken = opened.undecoded(stream) if next(timed_pictures(opened), None) is None and opened.broken else None
        frames = list(all_pictures(source))
        begins = timeline(source).pictures
    except NoStreamError as error:
        raise UserError(f"video {str(source)!r}: expected a video, got {error}") from None
    except MediaError as error:
        raise UserError(
            f"video {str(source)!r}: expected a video, got a file that cannot be decoded ({error})"
        ) from None
    if not frames:
        raise UserError(f"video {str(source)!r}: expected a video, got {broken or 'a file without frames'}")
    audio, rate = read_track(source, begins or 0) if has_sound else (None, 0)
    return np.stack(frames), audio, fps, rate
