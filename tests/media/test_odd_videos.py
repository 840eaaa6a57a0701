# SPDX-License-Identifier: Apache-2.0
"""Videos as few people have them: slow ones, bare streams, wide colours, and what is none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from talkingdit.data.probe import probe
from talkingdit.errors import UserError
from talkingdit.media import notices
from talkingdit.media.edited import open_edited
from talkingdit.media.files import read_video
from talkingdit.media.notices import MediaWarning
from talkingdit.media.pose import PoseVideo
from talkingdit.media.reader import all_pictures

COUNT = 20
# To linear sRGB from linear Display P3 and BT.2020, both of D65: published.
P3 = ((1.2249401, -0.2249404, 0.0), (-0.0420569, 1.0420571, 0.0), (-0.0196376, -0.0786361, 1.0982735))
BT2020 = ((1.660491, -0.587641, -0.072850), (-0.124551, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730))


@pytest.fixture(autouse=True)
def _anew() -> None:
    notices.forget()


def write(
    path: Path,
    frames: list[np.ndarray],
    rate: Fraction,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    **colours: int,
) -> Path:
    """A video of RGB frames; colours: attributes of the encoder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        stream.options = {"bf": "3", "preset": "ultrafast", "b-adapt": "0"} if codec == "libx264" else {}
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)
        for number, pixel in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixel, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def bars() -> list[np.ndarray]:
    """Frames that tell their number: so many of 20 columns are bright."""
    frames = np.full((COUNT, 32, 80, 3), 20, np.uint8)
    for number in range(COUNT):
        frames[number, :, : 4 * (number + 1)] = 220
    return list(frames)


def number(frame: np.ndarray) -> int:
    return round((frame[16].mean(1) > 120).mean() * COUNT) - 1


@pytest.mark.parametrize(
    ("suffix", "rate"),
    [*((suffix, Fraction(rate)) for suffix in ("mkv", "mp4") for rate in ("1/4", "1", "3/2")), ("ts", Fraction(1))],
)
def test_slow_videos_keep_their_pictures_in_place(suffix: str, rate: Fraction, tmp_path: Path) -> None:
    """In Matroska pictures lie back by seconds in their order of decoding; their clock has not started anew."""
    path = write(tmp_path / f"v.{suffix}", bars(), rate)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MediaWarning)
        found, edited = probe(path), open_edited(path)
        assert [number(frame) for frame in all_pictures(path)] == list(range(COUNT))
        assert [number(frame) for frame in edited.read()] == list(range(COUNT))
    assert (edited.frames, edited.rate) == (COUNT, rate)
    assert found.seconds == pytest.approx(COUNT / rate, rel=0.02)


@pytest.mark.parametrize("rate", [24, 30, 50])
def test_a_bare_stream_of_pictures_has_as_many_as_are_counted(rate: int, tmp_path: Path) -> None:
    """It has no clock, and its packets and pictures claim different lengths."""
    path = write(tmp_path / "v.h264", bars(), Fraction(rate))
    edited = open_edited(path)
    assert [number(frame) for frame in edited.read()] == list(range(COUNT))
    assert probe(path).seconds == pytest.approx(COUNT / float(edited.rate), rel=0.01)


@pytest.mark.parametrize(("primaries", "curve", "matrix"), [(12, 13, P3), (9, 14, BT2020), (9, 18, BT2020)])
def test_wide_colours_become_those_of_srgb(
    primaries: int, curve: int, matrix: tuple[tuple[float, ...], ...], tmp_path: Path
) -> None:
    """Also of HLG, as screens of standard range show it: off by up to 60 of 255 before."""
    shown = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = write(tmp_path / "v.mkv", [shown], Fraction(25), "ffv1", "bgr0", color_primaries=primaries, color_trc=curve)
    values = shown / 255
    linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
    mixed = np.clip(linear @ np.array(matrix).T, 0, 1)
    wanted = 255 * np.where(mixed > 0.0031308, 1.055 * mixed ** (1 / 2.4) - 0.055, mixed * 12.92)
    (found,) = all_pictures(path)
    assert np.abs(found - wanted).max() < 1.5
    plain = write(tmp_path / "p.mkv", [shown], Fraction(25), "ffv1", "bgr0", color_primaries=1, color_trc=1)
    assert np.array_equal(next(all_pictures(plain)), shown)


def test_high_range_is_told_once(tmp_path: Path) -> None:
    frames = bars()[:3]
    path = write(tmp_path / "v.mkv", frames, Fraction(25), "ffv1", "bgr0", color_primaries=9, color_trc=16)
    with pytest.warns(MediaWarning, match=r"v\.mkv: a high-range video \(PQ\).*convert it to standard range") as told:
        assert len(list(all_pictures(path))) == 3
    assert len(told) == 1


def animated_webp(path: Path) -> None:
    first, *others = map(Image.fromarray, bars()[:3])
    first.save(path, "WEBP", save_all=True, append_images=others)


@pytest.mark.filterwarnings("ignore::talkingdit.media.notices.MediaWarning")
@pytest.mark.parametrize("read", [lambda path: PoseVideo(path, 16), open_edited, read_video])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (os.mkfifo, "expected a file that can be read twice, got a pipe; save it first"),
        (lambda path: path.symlink_to("nowhere"), "expected an existing file, got a link that leads to none"),
        (Path.mkdir, "expected a file, got a folder"),
        (animated_webp, "got a file of 1 packet of webp, none of which can be decoded"),
    ],
)
def test_what_is_no_video_is_named(
    make: Callable[[Path], object], sentence: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / "v.mp4")
    with pytest.raises(UserError, match=sentence) as caught:
        read(tmp_path / "v.mp4")
    assert "\n" not in str(caught.value)
