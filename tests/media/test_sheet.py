# SPDX-License-Identifier: Apache-2.0
"""The preview sheet: pictures, sound and curves at the right place on one time axis."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from talkingdit.errors import UserError
from talkingdit.media.sheet import COLOURS, MARGIN, PAPER, WAVE, WIDTH, preview_sheet, sample_frames

LEFT, RIGHT = MARGIN + 52, WIDTH - MARGIN


def seen(sheet: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Coordinates (y, x) of the pixels of one colour."""
    return np.argwhere((sheet == colour).all(axis=-1))


def draw(path: Path, **changes: object) -> np.ndarray:
    frames = np.zeros((64, 48, 48, 3), np.uint8)
    frames[..., 1] = np.arange(64, dtype=np.uint8)[:, None, None] * 3 + 20
    options: dict = {
        "frames": frames,
        "waveform": np.zeros(4 * 16000, np.float32),
        "rate": 16000,
        "fps": 16,
        "curves": {"mouth": np.zeros(64)},
        "path": path,
    }
    preview_sheet(**{**options, **changes})
    return np.asarray(Image.open(path))


def test_pictures_are_spread_over_the_video(tmp_path: Path) -> None:
    assert sample_frames(64, 4).tolist() == [8, 24, 40, 56]
    assert sample_frames(3, 20).tolist() == [0, 1, 2]
    sheet = draw(tmp_path / "a.png", columns=4, rows=2)
    for index in sample_frames(64, 8):
        assert len(seen(sheet, (0, int(index) * 3 + 20, 0))) > 1000
    assert not len(seen(sheet, (0, 20, 0)))


def test_sound_and_curve_share_the_time_axis(tmp_path: Path) -> None:
    wave = np.zeros(4 * 16000, np.float32)
    wave[3 * 16000 : 3 * 16000 + 400] = np.tile([0.5, -0.5], 200)
    curve = np.zeros(64)
    curve[48] = 1.0  # the frame that begins at 3 s
    sheet = draw(tmp_path / "a.png", waveform=wave, curves={"mouth": curve})
    second = (RIGHT - LEFT) / 4
    marks = seen(sheet, WAVE)
    tall = [x for x in np.unique(marks[:, 1]) if (marks[:, 1] == x).sum() > 20]
    assert abs(min(tall) - (LEFT + 3 * second)) <= 2
    line = seen(sheet, COLOURS[0])
    line = line[line[:, 1] > LEFT + second]  # not the legend
    peak = line[line[:, 0] == line[:, 0].min()]
    assert abs(peak[:, 1].mean() - (LEFT + (48.5 / 16) * second)) <= 3


def test_higher_values_are_drawn_higher_and_gaps_stay_open(tmp_path: Path) -> None:
    low, high = np.full(64, 0.2), np.full(64, 0.8)
    high[20:40] = np.nan
    sheet = draw(tmp_path / "a.png", curves={"low": low, "high": high})
    inside = slice(LEFT + 300, RIGHT - 20)
    below, above = seen(sheet[:, inside], COLOURS[0]), seen(sheet[:, inside], COLOURS[1])
    assert below[:, 0].mean() > above[:, 0].mean() + 40
    columns = np.unique(above[:, 1]) + 300
    pixels = (RIGHT - LEFT) / 64
    assert not ((columns > 21 * pixels) & (columns < 39 * pixels)).any()


def test_selected_pictures_of_a_long_video(tmp_path: Path) -> None:
    frames = np.full((3, 32, 32, 3), (10, 200, 30), np.uint8)
    sheet = draw(tmp_path / "a.png", frames=frames, times=[0.5, 30.0, 59.0], curves={"mouth": np.zeros(960)})
    assert len(seen(sheet, (10, 200, 30))) > 3000


def test_it_looks_like_a_sheet_without_curves_or_title(tmp_path: Path) -> None:
    plain = draw(tmp_path / "a.png", curves={})
    full = draw(tmp_path / "b.png", title="Someone speaks")
    assert plain.shape[1] == full.shape[1] == WIDTH
    assert full.shape[0] > plain.shape[0]
    assert tuple(plain[0, 0]) == PAPER
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frames": np.zeros((4, 8, 8), np.uint8)}, r"frames must be uint8 \[F, H, W, 3\], got uint8 \(4, 8, 8\)"),
        ({"frames": np.zeros((4, 8, 8, 3))}, "got float64"),
        ({"waveform": np.zeros((2, 8))}, r"waveform must be \[samples\]"),
        ({"curves": {"lips": np.zeros((2, 2))}}, r"curve 'lips' must be \[frames\], got shape \(2, 2\)"),
        ({"times": [1.0]}, r"times must be one per frame \(64\), got 1"),
    ],
)
def test_bad_input(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        draw(tmp_path / "a.png", **changes)
    assert os.listdir(tmp_path) == []


def test_unwritable_target(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected an existing folder"):
        draw(tmp_path / "nowhere" / "a.png")


def test_boxes_are_shown_on_the_first_frame_alone():
    from talkingdit.pipelines.inputs import Mark
    from talkingdit.pipelines.write import marked

    frames = np.zeros((3, 60, 80, 3), np.uint8)
    shown = marked(frames, (Mark("anna", (10.0, 5.0, 40.0, 50.0)), Mark("", (50.0, 5.0, 70.0, 50.0))))
    assert np.array_equal(shown[1:], frames[1:])
    assert shown[0, 5, 10:41].any(1).all()
    assert shown[0, 5:51, 70].any(1).all()
    assert not shown[0, 30:45, 15:35].any()  # inside of a box, below its name
    assert marked(frames, ()) is frames
