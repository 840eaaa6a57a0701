# SPDX-License-Identifier: Apache-2.0
"""A video that is watched while it is made: every moment of the file, and what a closed pipe leaves, plays."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from talkingdit.errors import UserError
from talkingdit.media.files import VideoWriter, read_video

FPS, RATE = 25, 16000


def pictures(count: int, first: int = 0) -> NDArray[np.uint8]:
    """Grey levels that count, [n, 64, 96, 3]."""
    levels = (40 + 3 * (np.arange(first, first + count) % 60)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, 64, 96, 3)).copy()


def tone(seconds: float) -> NDArray[np.float32]:
    return (0.3 * np.sin(2 * np.pi * 220 * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def decoded(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_live_file_plays_at_every_moment_and_is_the_video_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "live.mp4"
    path.write_bytes(b"older")
    with VideoWriter(path, FPS, (64, 96), tone(4), live=True) as writer:
        assert path.read_bytes() == b"older"  # until there is something to see
        for first in range(0, 100, 20):
            writer.write(pictures(20, first))
            seen = decoded(path.read_bytes())
            assert first + 20 - 0.5 * FPS <= seen <= first + 20
    frames, sound, fps, _ = read_video(path)
    assert (len(frames), fps) == (100, FPS)
    assert sound is not None
    assert abs(len(sound) / RATE - 4) < 0.1
    assert np.abs(frames.astype(int).mean((1, 2, 3)) - pictures(100).mean((1, 2, 3))).max() < 3
    assert [file.name for file in tmp_path.iterdir()] == ["live.mp4"]
    # The sound begins with the pictures, as in a file that is not live.
    with VideoWriter(tmp_path / "whole.mp4", FPS, (64, 96), tone(4)) as writer:
        writer.write(pictures(100))
    other = read_video(tmp_path / "whole.mp4")[1]
    assert other is not None
    count = min(len(other), len(sound))
    assert np.abs(other[:count] - sound[:count]).max() < 0.05


def test_what_an_error_leaves_plays_to_its_last_frame(tmp_path: Path) -> None:
    path = tmp_path / "live.mp4"
    writer = VideoWriter(path, FPS, (64, 96), tone(4), live=True)
    writer.write(pictures(33))
    with pytest.raises(RuntimeError), writer:
        raise RuntimeError
    frames, sound, _, _ = read_video(path)
    assert len(frames) == 33
    assert sound is not None
    assert abs(len(sound) / RATE - 33 / FPS) < 0.1


def test_nothing_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "live.mp4"
    with pytest.raises(RuntimeError), VideoWriter(path, FPS, (64, 96), live=True):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_pipe_takes_the_video_and_its_reader_may_go_away() -> None:
    end, begin = os.pipe()
    read: list[bytes] = []

    def reader(least: int) -> None:
        while sum(map(len, read)) < least and (data := os.read(end, 1 << 16)):
            read.append(data)
        os.close(end)

    thread = threading.Thread(target=reader, args=(100_000,))  # some fragments
    thread.start()
    noise = np.random.default_rng(0)

    def write() -> None:
        with VideoWriter("standard output", FPS, (64, 96), live=begin) as writer:
            for _ in range(50):
                writer.write(noise.integers(0, 255, (4, 64, 96, 3), dtype=np.uint8))

    with pytest.raises(UserError, match=r"standard output.*could not be written"):
        write()
    thread.join()
    os.close(begin)
    whole, data = 0, b"".join(read)
    while whole + 8 <= len(data) and whole + (size := int.from_bytes(data[whole : whole + 4], "big")) <= len(data):
        whole += size
    assert decoded(data[:whole]) > 0  # boxes; the last one that was read may be cut
