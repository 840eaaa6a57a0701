# SPDX-License-Identifier: Apache-2.0
"""Media files opened as files, whatever they are called.

FFmpeg takes a name such as `voice:1.m4a` or `2025-11-27T12:30.mp4` for an address with a protocol, and lets a playlist
lead it to other files and hosts. Here it gets an open file, and nothing besides.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.container import InputContainer


@contextmanager
def open_media(path: str | os.PathLike[str], format: str | None = None) -> Iterator[InputContainer]:
    """A sound, image or video file, to be read with PyAV.

    Args:
        path: a file; any name.
        format: of FFmpeg, where content does not tell.

    Raises:
        OSError: it cannot be read.
        av.FFmpegError: it is of no format that FFmpeg knows.
    """
    import av

    # A list of allowed protocols without any: files that name others are not followed. It is for the container alone:
    # given to its streams too, it ends PyAV 15 and 17 on some formats.
    with (
        open(path, "rb") as file,
        av.open(file, mode="r", format=format, container_options={"protocol_whitelist": "none"}) as container,
    ):
        yield container


def as_target(path: str | os.PathLike[str]) -> str:
    """What to call a file for FFmpeg to write to, which it opens twice: to write, and to put the index in front."""
    return f"file:{os.path.abspath(path)}"
