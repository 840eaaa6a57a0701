# SPDX-License-Identifier: Apache-2.0
"""Sizes that the official program chose (recorded), and pictures cut and resized as it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from talkingdit.errors import UserError
from talkingdit.media.files import VideoWriter, read_video
from talkingdit.media.framing import Frames, fit_image, fit_portrait, fit_pose, output_size
from talkingdit.media.pose import PoseVideo

# Height and width of a picture, and of its video within 704*1024, 480*832 and 720*1280 pixels: numbers that
# get_size_less_than_area of the official program gives.
SIZES = {
    (480, 832): ((512, 832), (448, 832), (512, 832)),
    (832, 480): ((832, 512), (832, 448), (832, 512)),
    (720, 1280): ((640, 1088), (448, 832), (704, 1280)),
    (1080, 1920): ((640, 1088), (448, 832), (704, 1280)),
    (512, 512): ((512, 512), (512, 512), (512, 512)),
    (1024, 1024): ((832, 832), (576, 576), (960, 960)),
    (3000, 2000): ((1024, 704), (768, 512), (1152, 768)),
    (100, 3000): ((128, 3008), (128, 3008), (128, 3008)),
    (333, 777): ((384, 832), (384, 832), (384, 832)),
}


@pytest.mark.parametrize("picture", SIZES)
def test_the_official_sizes(picture: tuple[int, int]) -> None:
    assert tuple(output_size(*picture, area) for area in (704 * 1024, 480 * 832, 720 * 1280)) == SIZES[picture]


def test_sizes_are_multiples_within_the_area_and_near_the_shape() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(side) for side in random.integers(200, 4000, 2))
        if not 0.4 < height / width < 2.5:
            continue
        found = output_size(height, width, 704 * 1024)
        assert not found[0] % 64
        assert not found[1] % 64
        assert 0 < found[0] * found[1] <= 704 * 1024
        assert 0.75 < found[0] / found[1] / (height / width) < 1.34


def test_no_size_fits() -> None:
    with pytest.raises(UserError, match=r"an image of 200 x 100 pixels does not fit into 4000 pixels .* of 64"):
        output_size(100, 200, 4000)


def ramp(height: int, width: int) -> Frames:
    """Red grows to the right, green downwards, from 40 to 215."""
    y, x = np.mgrid[0:height, 0:width]
    parts = (x / (width - 1), y / (height - 1), np.full((height, width), 0.5))
    return np.stack([40 + 175 * part for part in parts], axis=2).round().astype(np.uint8)


def test_the_middle_of_the_resized_picture_is_kept() -> None:
    image = ramp(100, 300)
    cut, black = fit_image(image, (64, 128))
    resized = np.asarray(Image.fromarray(image).resize((192, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(cut, resized[:, 32:160])
    assert black == 0


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_image(image, (64, 128))[0], image)


def test_what_the_picture_lacks_is_black_or_covered() -> None:
    image = ramp(100, 150)  # 64 x 96 after resizing
    cut, black = fit_image(image, (64, 128))
    assert black == 32
    assert not cut[:, :16].any()
    assert not cut[:, 112:].any()
    assert cut[:, 16:112].min() > 30
    covered, black = fit_image(image, (64, 128), cover=True)
    assert black == 0
    assert covered.shape == (64, 128, 3)
    assert covered.min() > 30
    assert (covered[0, 0, 0], covered[0, -1, 0]) == (40, 215)  # the whole width is there, the top is cut
    assert covered[0, 0, 1] > 50


def test_a_pose_picture_lies_where_the_portrait_lies() -> None:
    """Both are resized by the same rule: a face and its pose stay on each other."""
    for shape in ((100, 300), (300, 100), (64, 128), (100, 150)):
        image = ramp(*shape)
        picture, _ = fit_image(image, (64, 128))
        pose = ((fit_pose(image, (64, 128)) + 1) * 127.5).permute(1, 2, 0).numpy()
        inside = picture.any(axis=2)
        assert np.abs(pose - picture)[inside].max() < 1.5
        assert np.abs(pose[~inside] - 127.5).max(initial=0) < 1e-3  # grey, as the official program has it


def moving(path: Path, fps: float, count: int) -> Path:
    """A video whose picture n has the grey 40 + 7 n."""
    with VideoWriter(path, fps, (64, 64)) as writer:
        for n in range(count):
            writer.write(np.full((64, 64, 3), 40 + 7 * n, np.uint8))
    return path


def numbers(clip: torch.Tensor) -> list[int]:
    """Which picture each picture of a clip is, -1 for black."""
    greys = (clip[0].mean((0, 2, 3)) + 1) * 127.5
    return [-1 if grey < 20 else round((float(grey) - 40) / 7) for grey in greys]


@pytest.mark.parametrize(
    ("fps", "official", "wanted"),
    [
        (16, False, list(range(12))),
        (16, True, list(range(12))),
        (30, False, [0, 2, 4, 6, 8, 9, 11, 13, 15, 17, 19, 21]),  # nearest to n / 16 s
        (30, True, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]),
        (24, True, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]),
        (8, False, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]),
    ],
)
def test_pose_pictures_are_those_of_their_time(tmp_path: Path, fps: int, official: bool, wanted: list[int]) -> None:
    path = moving(tmp_path / "pose.mp4", fps, 26)
    clips = PoseVideo(path, 16, official).clips(6, (64, 64))
    assert numbers(next(clips)) + numbers(next(clips)) == wanted


def test_a_pose_video_that_ends_goes_on_black_and_can_begin_later(tmp_path: Path) -> None:
    video = PoseVideo(moving(tmp_path / "pose.mp4", 16, 10), 16)
    assert read_video(video.path)[0].shape[0] == 10
    clips = video.clips(4, (64, 64))
    found = [numbers(next(clips)) for _ in range(4)]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1], [-1] * 4]
    assert video.frames == 10
    later = PoseVideo(video.path, 16).clips(4, (64, 64), first=1)
    assert [numbers(next(later)) for _ in range(2)] == found[1:3]


def test_a_pose_that_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected an existing file"):
        PoseVideo(tmp_path / "none.mp4", 16)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(UserError, match="expected a video, got a file that is none"):
        PoseVideo(tmp_path / "text.mp4", 16)


@pytest.mark.parametrize(("shape", "size"), [((40, 60, 3), 40), ((60, 40, 3), 16), ((8, 8, 3), 16)])
def test_a_portrait_is_the_middle_square(shape: tuple[int, int, int], size: int) -> None:
    image = np.zeros(shape, np.uint8)
    side = min(shape[:2])
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    image[top : top + side, left : left + side] = 200
    square, cropped = fit_portrait(image, size)
    assert square.shape == (size, size, 3)
    assert square.min() == square.max() == 200
    assert cropped == (shape[0] != shape[1])
