# SPDX-License-Identifier: Apache-2.0
"""Media files opened as files, whatever they are called.

FFmpeg takes a name such as `voice:1.m4a` or `2025-11-27T12:30.mp4` for an address with a protocol, and lets a playlist
lead it to other files and hosts. Here it gets an open file, and nothing besides.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from av.container import InputContainer

# libswscale keeps a scaler's threads until a frame is freed. Where a data worker was forked meanwhile, freeing it there
# waits for threads that the worker does not have.
SCALER_THREADS = 1


@contextmanager
def open_media(path: str | os.PathLike[str], format: str | None = None) -> Iterator[InputContainer]:
    """A sound, image or video file, to be read with PyAV as it is. See `container.Source` for one on a clock.

    Args:
        path: a file; any name.
        format: of FFmpeg, where content does not tell.

    Raises:
        OSError: it cannot be read.
        av.FFmpegError: it is of no format that FFmpeg knows.
    """
    with open(path, "rb") as file, open_container(file, format) as container:
        yield container


def open_container(
    file: IO[bytes], format: str | None = None, options: Mapping[str, str] | None = None
) -> InputContainer:
    """The container in an open file; files that it names are not followed.

    Args:
        format: see `open_media`.
        options: of FFmpeg's demuxer.

    Raises:
        av.FFmpegError, ValueError: it is of no format that FFmpeg knows.
    """
    import av

    # Of all protocols, only the one for data inside of the file itself. The list is for the container alone: given to
    # its streams too, it ends PyAV 15 and 17 on some formats.
    allowed = {"protocol_whitelist": "data"} | dict(options or {})
    return av.open(file, mode="r", format=format, container_options=allowed, metadata_errors="ignore")


def as_target(path: str | os.PathLike[str]) -> str:
    """What to call a file for FFmpeg to write to, which it opens twice: to write, and to put the index in front."""
    return f"file:{os.path.abspath(path)}"
