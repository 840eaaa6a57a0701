# SPDX-License-Identifier: Apache-2.0
"""A video that grows while it is watched, when its target goes away, fills up, or nobody reads it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from talkingdit.errors import UserError
from talkingdit.media.files import VideoWriter, read_video
from talkingdit.pipelines import resume

NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 64, 3), dtype=np.uint8)


def test_a_live_file_that_is_removed_is_told_at_once(tmp_path: Path) -> None:
    video = VideoWriter(tmp_path / "a.mp4", 16, (64, 64), live=True)
    video.write(NOISE[:32])
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(UserError, match="removed or replaced"):
        video.write(NOISE[32:])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_becomes_a_file_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    video = VideoWriter(folder / "a.mp4", 16, (64, 64))
    video.write(NOISE[:8])
    shutil.rmtree(folder)
    folder.write_text("")
    with pytest.raises(UserError, match="could not be written"):
        video.close()


def test_a_live_file_on_a_full_disk_ends_with_a_whole_fragment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a fragment fits; what comes after it would fit again."""
    pwrite, sizes = os.pwrite, []

    def full(descriptor: int, data: Any, at: int) -> int:
        if at > 60_000 and not sizes:
            sizes.append(at)
            return pwrite(descriptor, bytes(data)[: len(data) // 2], at)
        if len(sizes) == 1:
            sizes.append(at)
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(UserError, match="No space left"),
        VideoWriter(tmp_path / "a.mp4", 16, (64, 64), live=True) as video,
    ):
        video.write(NOISE)
    data, at = (tmp_path / "a.mp4").read_bytes(), 0
    while at < len(data):
        at += int.from_bytes(data[at : at + 4], "big")
    assert at == len(data)  # nothing but whole boxes
    assert 0 < len(read_video(tmp_path / "a.mp4")[0]) < len(NOISE)


def test_an_interruption_in_a_write_is_not_lost(tmp_path: Path) -> None:
    """It comes while the encoder is at work, so that the next Python that runs meets it."""
    out, into = os.pipe()
    video = VideoWriter("pipe", 16, (64, 64), live=into)
    timers = [
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)),
        threading.Timer(15.0, video.hurry),  # else it would wait for ever
    ]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where many tests run
    start = time.monotonic()
    try:
        for timer in timers:
            timer.start()
        with pytest.raises(KeyboardInterrupt):
            video.write(NOISE)  # more than the pipe holds, and nobody reads
        video.abort()
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGINT, before)
        os.close(out)
        os.close(into)
    assert time.monotonic() - start < 30


def test_a_reader_that_stalls_is_not_waited_for_where_there_is_hurry() -> None:
    out, into = os.pipe()
    video = VideoWriter("pipe", 16, (64, 64), live=into)
    failed: list[BaseException] = []

    def write() -> None:
        try:
            video.write(NOISE)
        except UserError as error:
            failed.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(1)
    assert thread.is_alive()
    video.hurry()
    thread.join(20)
    assert not thread.is_alive()
    assert "nobody reads it" in str(failed[0])
    os.close(out)
    os.close(into)


def test_two_live_videos_of_spoken_voices_do_not_meet(tmp_path: Path) -> None:
    first = resume.WatchedOnly(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="another run"):
        resume.WatchedOnly(tmp_path / "a.mp4")
    first.close()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_at_the_beginning_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="No space left"):
        resume.ClipStore(tmp_path / "a.mp4", {})
    assert not list(tmp_path.iterdir())
