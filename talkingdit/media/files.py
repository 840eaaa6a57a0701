# SPDX-License-Identifier: Apache-2.0
"""Sound, images and video files: read what people have, write what every player plays.

Everything a user may hand over is checked here, and every complaint is a `UserError` of one sentence. Sound is read in
`sound.py`, images in `image.py`, videos are written in `writer.py`; all of it can be had from here.
"""

from __future__ import annotations

import os

import numpy as np

from talkingdit.errors import UserError
from talkingdit.media.checks import existing_file, reason_of
from talkingdit.media.image import read_image
from talkingdit.media.opening import open_media
from talkingdit.media.sound import SPEECH_RATE, decode_with_av, read_audio, read_track
from talkingdit.media.targets import check_writable
from talkingdit.media.writer import VideoWriter

__all__ = ["SPEECH_RATE", "VideoWriter", "check_writable", "read_audio", "read_image", "read_track", "read_video"]


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray | None, float, int]:
    """Read a whole video into memory.

    Returns:
        frames uint8 [F, H, W, 3] RGB; sound float32 [samples] mono from the time of frame 0 on, or None; frames per
        second; rate of the sound in Hz (0 without sound).

    Raises:
        UserError: no such file, or not a video.
    """
    import av

    source = existing_file(path, "video")
    try:
        with open_media(source) as container:
            if not container.streams.video:
                raise UserError(f"video {str(source)!r}: expected a video, got a file without a video stream")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.base_rate or 0)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            has_sound = bool(container.streams.audio)
    except av.FFmpegError as error:
        raise UserError(
            f"video {str(source)!r}: expected a video, got a file that cannot be decoded ({reason_of(error)})"
        ) from None
    if not frames:
        raise UserError(f"video {str(source)!r}: expected a video, got a file without frames")
    audio, rate = decode_with_av(source) if has_sound else (None, 0)
    return np.stack(frames), audio, fps, rate
