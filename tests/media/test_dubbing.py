# SPDX-License-Identifier: Apache-2.0
"""A video that is changed in one place: read at its own rate, masked, composed back without a trace elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from painted_faces import painted_face

from talkingdit.detect.faces import available, faces
from talkingdit.errors import UserError
from talkingdit.media.compose import Crop, compose, crop_around, soft
from talkingdit.media.edited import open_edited
from talkingdit.media.files import VideoWriter
from talkingdit.media.mouths import Boxes, cell_masks, found_region, given_region

SIZE = (96, 128)


def pattern(count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frames that differ from each other everywhere, smooth enough for a codec."""
    y, x = np.mgrid[: size[0], : size[1]]
    base = [np.stack([2 * x + 3 * t, 2 * y + t, x + y + 5 * t], -1) % 512 for t in range(count)]
    return np.stack([np.where(b > 255, 511 - b, b).astype(np.uint8) for b in base])


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "in.mp4"
    with VideoWriter(path, Fraction(30000, 1001), SIZE, crf=4) as writer:
        writer.write(pattern(31))
    return path


def test_a_video_keeps_its_rate_and_every_picture(video: Path) -> None:
    edited = open_edited(video)
    assert (edited.rate, edited.frames, edited.size) == (Fraction(30000, 1001), 31, SIZE)
    frames = np.stack(list(edited.read()))
    with av.open(str(video)) as container:
        wanted = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    np.testing.assert_array_equal(frames, wanted)
    np.testing.assert_array_equal(np.stack(list(edited.read(17, 5))), wanted[17:22])


def test_what_is_no_video_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected an existing file"):
        open_edited(tmp_path / "none.mp4")
    (tmp_path / "words.mp4").write_text("no video")
    with pytest.raises(UserError, match="a file that is none"):
        open_edited(tmp_path / "words.mp4")


@pytest.mark.parametrize(
    ("mask", "message"),
    [("10,10,200,20", "inside of the 128 x 96"), ("10,10,10,20", "expected a box"), ("none.png", "none.png")],
)
def test_a_mask_that_cannot_be_is_told(video: Path, mask: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        given_region(mask, open_edited(video))


@dataclass
class Found:
    box: tuple[float, float, float, float]
    landmarks: tuple = ()


def test_a_face_is_followed_over_gaps_and_others_are_not(video: Path) -> None:
    edited, calls = open_edited(video), []

    def detect(frame: np.ndarray) -> list[Found]:
        number = 4 * len(calls)  # looked at every fourth picture of 30 a second
        calls.append(number)
        other = Found((100, 0, 110, 10))
        if number == 8:
            return [other]
        return [other, Found((10 + number, 20, 50 + number, 60))]

    region = found_region(edited, detect)
    assert isinstance(region, Boxes)
    boxes = region.boxes
    assert boxes.shape == (31, 4)
    assert len(calls) == 9
    np.testing.assert_allclose(boxes[:, 0].clip(min=0), (10 - 0.08 * 40 + np.arange(31)).clip(min=0), atol=2.5)
    np.testing.assert_allclose(boxes[:, 1], 40)
    with pytest.raises(UserError, match="no face was found"):
        found_region(edited, lambda frame: [])


@pytest.mark.skipif(not available(), reason="the weights of the face detector are not installed")
def test_a_painted_face_is_found_and_its_mouth_is_in_the_mask(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "face.mp4", 25, (192, 256), crf=4) as writer:
        for number in range(9):
            frame = np.full((192, 256, 3), (90, 110, 130), np.uint8)
            frame[16:176, 30 + 3 * number : 190 + 3 * number] = painted_face(160)
            writer.write(frame)
    region = found_region(open_edited(tmp_path / "face.mp4"), faces)
    for number in (0, 4, 8):
        mask = region.masks(number, 1)[0]
        mouth = 16 + round(160 * (0.5 + 0.55 * 0.44)), 30 + 3 * number + 80
        eyes = 16 + round(160 * (0.5 - 0.15 * 0.44))
        assert mask[mouth[0] - 6 : mouth[0] + 6, mouth[1] - 14 : mouth[1] + 14].all()
        assert not mask[:eyes].any()


def test_masks_are_max_pooled_as_the_autoencoder_shrinks_frames() -> None:
    masks = np.zeros((9, 16, 24), bool)
    masks[0, 3, 3] = masks[4, 15, 23] = masks[5, 0, 8] = True
    cells = cell_masks(masks)
    wanted = np.zeros((3, 2, 3), np.float32)
    wanted[0, 0, 0] = wanted[1, 1, 2] = wanted[2, 0, 1] = 1
    np.testing.assert_array_equal(cells, wanted)
    with pytest.raises(ValueError, match="must be"):
        cell_masks(masks[:8])


@pytest.mark.parametrize("crop", [Crop(0, 0, 96, 128, (96, 128)), Crop(10, 30, 80, 80, (48, 48))])
def test_nothing_changes_outside_of_the_mask_and_the_seam_is_hidden(crop: Crop) -> None:
    frame = pattern(3)[2]
    mask = np.zeros(SIZE, bool)
    mask[40:80, 50:95] = True
    generated = np.clip(crop.see(frame).astype(int) + 40, 0, 255).astype(np.uint8)  # brighter by mistake
    result = compose(frame, generated, mask, crop)
    np.testing.assert_array_equal(result[~mask], frame[~mask])
    # A frame that differs in brightness alone comes back almost as it was, and without an edge.
    free = mask & (frame.max(-1) < 200)
    assert np.abs(result[free].astype(int) - frame[free]).mean() < 8
    black = compose(frame, np.zeros((*crop.size, 3), np.uint8), mask, crop)
    assert (black[60, 70] != frame[60, 70]).any()


def test_weights_are_zero_outside_and_rise_inside() -> None:
    mask = np.zeros((40, 40), bool)
    mask[10:30, 8:32] = True
    weight = soft(mask)
    assert not weight[~mask].any()
    assert weight[20, 20] == 1
    assert (np.diff(weight[20, 8:20]) >= 0).all()
    assert 0 < weight[20, 8] < 0.5
    assert (soft(np.ones((8, 8), bool)) == 1).all()


def test_a_small_frame_is_seen_whole_and_of_a_large_one_the_face() -> None:
    whole = crop_around((40, 50, 60, 70), (96, 96), 96 * 96, 16)
    assert (whole.height, whole.width, whole.size) == (96, 96, (96, 96))
    face = crop_around((900, 500, 1000, 580), (1080, 1920), 480 * 480, 16)
    assert face.size == (480, 480)
    assert (face.height, face.width) == (480, 480)
    assert face.left < 900
    assert face.left + 480 > 1000
    near = crop_around((200, 300, 1400, 1000), (1080, 1920), 480 * 832, 16)
    assert near.size[0] * near.size[1] <= 480 * 832
    assert near.left + near.width <= 1920
    assert near.top + near.height <= 1080
