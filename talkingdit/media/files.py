# SPDX-License-Identifier: Apache-2.0
"""Sound, images and video files: read what people have, write what every player plays.

Everything a user may hand over is checked here, and every complaint is a `UserError` of one sentence. Sound is read in
`sound.py`, videos are written in `writer.py`; all of it can be had from here.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from talkingdit.errors import UserError
from talkingdit.media.checks import check_writable, existing_file, reason_of
from talkingdit.media.container import MediaError, NoStreamError, Source
from talkingdit.media.reader import all_pictures
from talkingdit.media.sound import SPEECH_RATE, read_audio, read_track, sound_blocks
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

LARGEST_IMAGE = 100_000_000  # pixels


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image upright (EXIF orientation applied), transparency over white.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        UserError: no such file, empty, not an image, truncated, or more than 100 million pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    source = existing_file(path, "image")
    try:
        with Image.open(source) as opened:
            if opened.width * opened.height > LARGEST_IMAGE:
                raise UserError(
                    f"image {str(source)!r}: expected at most {LARGEST_IMAGE // 1_000_000} million pixels, "
                    f"got {opened.width} x {opened.height}"
                )
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # 16-bit greys would be clipped, not scaled
                grey = (np.asarray(image, dtype=np.uint32) // 257).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            rgba = image.convert("RGBA")
    except UnidentifiedImageError:
        raise UserError(f"image {str(source)!r}: expected an image (PNG, JPEG, WebP), got {_kind(source)}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"image {str(source)!r}: expected a whole image, got one that cannot be decoded ({reason_of(error)})"
        ) from None
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.array(Image.alpha_composite(white, rgba).convert("RGB"))


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
        with Source(source) as opened:
            stream = opened.need_pictures()
            fps = float(stream.average_rate or stream.base_rate or 0)
            has_sound = opened.sound is not None
        frames = list(all_pictures(source))
        begins = timeline(source).pictures
    except NoStreamError as error:
        raise UserError(f"video {str(source)!r}: expected a video, got {error}") from None
    except MediaError as error:
        raise UserError(
            f"video {str(source)!r}: expected a video, got a file that cannot be decoded ({error})"
        ) from None
    if not frames:
        raise UserError(f"video {str(source)!r}: expected a video, got a file without frames")
    audio, rate = read_track(source, begins or 0) if has_sound else (None, 0)
    return np.stack(frames), audio, fps, rate


def _kind(source: Path) -> str:
    """What a file that is no image is, as far as FFmpeg can tell."""
    try:
        with Source(source) as opened:
            # FFmpeg plays text as a terminal, and believes the name of a file that should be an image.
            name = opened.container.format.name
            if opened.pictures is not None and name not in ("tty", "image2") and not name.endswith("_pipe"):
                return "a video"
            if opened.sound is not None:
                return "a sound file"
    except MediaError:
        pass
    return "a file of another kind"
