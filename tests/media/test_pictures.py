# SPDX-License-Identifier: Apache-2.0
"""The pictures of a video: the same file for the same frames, and colours that are read back as they were."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from talkingdit.media import pictures
from talkingdit.media.files import VideoWriter, read_video
from talkingdit.media.pictures import repeatable, to_yuv
from talkingdit.media.reader import all_pictures

# Five videos: of three widths that are no multiple of 128, in a process that is fresh to begin with and used later.
ENCODE = """
import hashlib, sys
import numpy as np
from talkingdit.media.writer import VideoWriter
sound = np.sin(np.arange(16000) / 9).astype(np.float32)
used = []
for number, (height, width) in enumerate([(64, 200), (448, 832), (96, 96), (64, 200), (448, 832)]):
    rng = np.random.default_rng(0)
    still = rng.integers(0, 255, (height // 8 + 4, width // 8 + 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with VideoWriter(sys.argv[1], 16, (height, width), sound, 16000) as video:
        for i in range(16):
            video.write(np.ascontiguousarray(still[i : i + height, 2 * i % 16 : 2 * i % 16 + width]))
    with open(sys.argv[1], "rb") as file:
        print(height, width, hashlib.sha256(file.read()).hexdigest())
    used = [*used[-1:], np.random.default_rng(number).integers(0, 255, 3_000_000, dtype=np.uint8)]
"""


def test_thirty_encodings_of_the_same_frames_are_the_same_files(tmp_path: Path) -> None:
    found: dict[str, set[str]] = {}
    count = 0
    for number, filling in enumerate(("", "0", "1", "85", "170", "255")):
        given = os.environ | ({"MALLOC_PERTURB_": filling} if filling else {})
        given["PYTHONPATH"] = str(Path(pictures.__file__).parents[2])
        target = str(tmp_path / f"{number}.mp4")
        done = subprocess.run([sys.executable, "-c", ENCODE, target], env=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():
            size, _, digest = line.rpartition(" ")
            found.setdefault(size, set()).add(digest)
            count += 1
    assert count == 30
    assert {size: len(files) for size, files in found.items()} == {"64 200": 1, "448 832": 1, "96 96": 1}


@pytest.mark.parametrize(
    ("machine", "features", "wanted"),
    [
        ("x86_64", {"avx512f", "avx2", "bmi2", "fma"}, {"x264-params": "asm=AVX2"}),
        ("x86_64", {"avx2", "bmi2", "fma"}, {}),
        ("AMD64", set(), {"x264-params": "mbtree=0"}),
        ("aarch64", set(), {}),
    ],
)
def test_how_files_are_made_equal_goes_by_the_processor(
    monkeypatch: pytest.MonkeyPatch, machine: str, features: set[str], wanted: dict[str, str]
) -> None:
    monkeypatch.setattr(pictures.platform, "machine", lambda: machine)
    monkeypatch.setattr(pictures, "_features", lambda: frozenset(features))
    assert repeatable.__wrapped__() == wanted


def test_the_way_without_the_tree_is_known_to_the_encoder() -> None:
    """x264 leaves out options that it does not know, with no more than a warning."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    made = []
    for params in ("", "mbtree=0"):
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
            stream.options = {"crf": "16"} | ({"x264-params": params} if params else {})
            for frame in noise:
                container.mux(stream.encode(to_yuv(frame)))
            container.mux(stream.encode(None))
        made.append(file.getvalue())
    assert b"mbtree=1" in made[0]
    assert b"mbtree=0" in made[1]


def yuv(colours: np.ndarray, red: float, blue: float) -> np.ndarray:
    """Y'CbCr of limited range (ITU-R BT.709 and BT.601, 3.2 and 2.5)."""
    rgb = colours / 255
    luma = rgb @ np.array([red, 1 - red - blue, blue])
    parts = (
        luma * 219 + 16,
        (rgb[..., 2] - luma) / (2 - 2 * blue) * 224 + 128,
        (rgb[..., 0] - luma) / (2 - 2 * red) * 224 + 128,
    )
    return np.stack(parts, axis=-1)


@pytest.mark.parametrize(
    ("size", "matrix", "tags"),
    [
        ((96, 96), (0.299, 0.114), (5, 2, 2)),
        ((576, 96), (0.299, 0.114), (5, 2, 2)),
        ((578, 96), (0.2126, 0.0722), (1, 1, 1)),
        ((832, 480), (0.2126, 0.0722), (1, 1, 1)),
    ],
)
def test_videos_of_many_lines_are_of_bt709_and_say_so(
    tmp_path: Path, size: tuple[int, int], matrix: tuple[float, float], tags: tuple[int, int, int]
) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (4, 3)).astype(np.uint8)
    frame = np.repeat(colours[None], size[0], 0).repeat(size[1] // 4, 1)
    for upscale in (1, 2):
        if size[0] % (2 * upscale) or size[1] % (8 * upscale):
            continue
        given = frame[::upscale, ::upscale]
        with VideoWriter(tmp_path / "a.mp4", 16, given.shape[:2], upscale=upscale, resample="nearest") as video:
            video.write(np.stack([given] * 4))
        with av.open(str(tmp_path / "a.mp4")) as container:
            stream = container.streams.video[0]
            shown = next(container.decode(stream))
            about = stream.codec_context
            assert (about.colorspace, about.color_primaries, about.color_trc) == tags
            assert about.color_range == 1
        planes = [np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in shown.planes]
        at = np.arange(4) * size[1] // 4 + size[1] // 8
        found = np.stack([planes[0][40, at], planes[1][20, at // 2], planes[2][20, at // 2]], axis=-1)
        assert np.abs(found - yuv(colours, *matrix)).max() <= 2
        assert np.abs(read_video(tmp_path / "a.mp4")[0][2, 40, at].astype(int) - colours).max() <= 6
        assert (b"colrnclx" in (tmp_path / "a.mp4").read_bytes()) == (tags[0] == 1)  # for players that look there


@pytest.mark.parametrize("width", [1080, 854, 852, 838, 720])
def test_pictures_are_read_to_their_last_column(tmp_path: Path, width: int) -> None:
    """Where a width leaves 1 to 8 when divided by 16, libswscale writes no last columns of planar RGB, and PyAV's RGBA
    lacks up to 4 (findings/gbrp_last_columns.sh)."""
    greys = (200, 40, 120, 250, 5)
    with VideoWriter(tmp_path / "grey.mp4", 10, (32, width), crf=1) as video:
        for grey in greys:
            video.write(np.full((32, width, 3), grey, np.uint8))
    found = list(all_pictures(tmp_path / "grey.mp4"))
    assert [picture.shape for picture in found] == [(32, width, 3)] * len(greys)
    assert max(np.abs(picture.astype(int) - grey).max() for picture, grey in zip(found, greys, strict=True)) <= 3
