# SPDX-License-Identifier: Apache-2.0
"""Which frames of a file a clip gets, whatever its rate, key frames and clock are, and what damaged files lead to."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import draw, number_of, truncate, write_video, write_voice

from talkingdit.data.clips import read_clip, read_frames, read_mask, times
from talkingdit.data.probe import probe
from talkingdit.errors import UserError


def numbers(path: Path, wanted: list[Fraction]) -> list[int]:
    return [number_of(frame) for frame in read_frames(path, wanted)]


@pytest.mark.parametrize("fps", [16, 24, 25, Fraction(30000, 1001), 50, 10])
@pytest.mark.parametrize("first", [0, 3, 7])
def test_the_nearest_frame_in_time_is_taken(tmp_path: Path, fps: Fraction, first: int) -> None:
    """The rule by which generation reads a pose video: picture p is frame floor(p rate / fps + 1/2) of the file."""
    path = write_video(tmp_path / "v.mp4", draw(27), fps)
    ratio = Fraction(fps) / 16
    count = 4 if first < 7 else 1
    wanted = [math.floor(p * ratio + Fraction(1, 2)) for p in range(first, first + count)]
    assert numbers(path, times(0, first, count, 16)) == wanted


def test_times_count_from_the_start_of_the_entry(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", draw(27), 20)
    assert numbers(path, times(0.5, 0, 3, 10)) == [10, 12, 14]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_searching_a_file_finds_the_same_frames_as_reading_it_from_the_beginning(tmp_path: Path, suffix: str) -> None:
    """Key frames lie between, and the clock of a transport stream begins at 1.4 s."""
    path = write_video(tmp_path / f"v{suffix}", draw(27), 16, group=6)
    everything = numbers(path, times(0, 0, 27, 16))
    assert everything == list(range(27))
    for first in (1, 5, 6, 13, 26):
        assert numbers(path, times(0, first, 27 - first, 16)) == everything[first:]


def test_a_video_without_a_constant_rate_is_read_by_its_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", draw(6), 16, times=[0.0, 0.1, 0.5, 0.52, 0.9, 1.0])
    assert numbers(path, times(0, 0, 11, 10)) == [0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5]


def test_the_last_frame_serves_half_a_frame_longer_and_no_more(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", draw(10), 10)
    assert numbers(path, [Fraction(95, 100)]) == [9]
    with pytest.raises(UserError, match=r"v.mp4 ends before 0.96 s"):
        numbers(path, [Fraction(96, 100)])


def test_a_phone_video_stands_upright(tmp_path: Path) -> None:
    """The file says with a matrix that its pictures must be turned."""
    path = write_video(tmp_path / "v.mp4", draw(3, (32, 48)), 16)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    path.write_bytes(data)
    frame = next(read_frames(path, times(0, 0, 1, 16)))
    assert frame.shape == (48, 32, 3)
    # Turned clockwise, the square in the upper left corner comes to the upper right one.
    red = np.argwhere(frame[..., 0].astype(int) - frame[..., 1] > 100).mean(0)
    assert red[0] < 10
    assert red[1] > 16
    assert (probe(path).height, probe(path).width) == (48, 32)


def test_pictures_cover_the_size(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", np.full((3, 30, 60, 3), 200, np.uint8), 16)
    for size in ((16, 64), (64, 16), (48, 48)):
        pictures = read_clip(path, times(0, 0, 3, 16), size)
        assert pictures.shape == (3, *size, 3)
        assert pictures.min() > 190


def test_a_box_covers_the_cells_that_it_covers_of_the_framed_picture() -> None:
    """The middle of a wide picture is cut out: its left quarter is gone, and so is that part of the box."""
    wanted = times(0, 0, 8, 16)
    mask = read_mask((0.0, 0.0, 0.5, 1.0), wanted, (32, 32), (32, 64))
    assert mask.shape == (2, 4, 4)
    assert torch.equal(mask, torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(2, 4, 4))


def test_a_mask_video_covers_what_any_picture_of_a_latent_covers(tmp_path: Path) -> None:
    masks = np.zeros((8, 32, 32, 3), np.uint8)
    masks[2, :8, :8] = 255  # in one picture of the first latent
    masks[4:, 8:16, 16:20] = 255  # half a cell in all of the second
    mask = read_mask(write_video(tmp_path / "m.mp4", masks, 16), times(0, 0, 8, 16), (32, 32), (32, 32))
    wanted = torch.zeros(2, 4, 4)
    wanted[0, 0, 0], wanted[1, 1, 2] = 1.0, 0.5
    assert (mask - wanted).abs().max() < 0.1


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "v.mp4"
    if kind == "text":
        path.write_text("not a video at all, but long enough to be looked at\n" * 50)
    elif kind == "sound":
        return write_voice(tmp_path / "v.wav", 1)
    elif kind == "truncated":
        truncate(write_video(path, np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8), 16))
    elif kind == "headless":
        truncate(write_video(path, draw(20), 16, front=False))
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "v.mp4 does not exist"),
        ("text", "v.mp4 cannot be decoded"),
        ("sound", "v.wav has no frames"),
        ("truncated", "v.mp4 (ends before|cannot be decoded at) .* s"),
        ("headless", "v.mp4 cannot be decoded"),
    ],
)
def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path, kind: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        list(read_frames(broken(tmp_path, kind), times(0, 0, 40, 16)))
    assert "\n" not in str(caught.value)
