# SPDX-License-Identifier: Apache-2.0
"""`TalkingPipeline` makes the video of the command line, from files and from what a program holds."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from api_world import RATE, World
from PIL import Image

import talkingdit
from talkingdit.cli.main import main
from talkingdit.media.files import read_video


def test_frames_are_those_of_the_command_line(
    world: World, pipe: talkingdit.TalkingPipeline, written: list[np.ndarray], tmp_path: Path
) -> None:
    files = ["--image", str(world.folder / "face.png"), "--audio", str(world.folder / "voice.wav")]
    more = ["--checkpoint", str(world.checkpoint), "--prompt", "a person", "--seed", "3", "--sequential"]
    assert main(["generate", *files, "-o", str(tmp_path / "cli.mp4"), *more]) == 0
    command = np.concatenate(written)
    written.clear()
    out = pipe(**world.given, seed=3, sequential=True)
    assert out.frames.shape == (20, 32, 32, 3)
    assert out.fps == 16
    assert not out.interrupted
    np.testing.assert_array_equal(out.frames, command)
    saved = out.save(tmp_path / "out.mp4")
    np.testing.assert_array_equal(np.concatenate(written), command)
    np.testing.assert_array_equal(read_video(saved)[0], read_video(tmp_path / "cli.mp4")[0])
    np.testing.assert_array_equal(read_video(saved)[1], read_video(tmp_path / "cli.mp4")[1])


def test_a_file_is_written_as_by_the_command_line_and_frames_are_read_back(
    world: World, pipe: talkingdit.TalkingPipeline, whole: np.ndarray, written: list[np.ndarray], tmp_path: Path
) -> None:
    out = pipe(**world.given, output=tmp_path / "out.mp4", sheet=tmp_path / "out.png", upscale=2)
    np.testing.assert_array_equal(np.concatenate(written), whole)
    assert out.path == tmp_path / "out.mp4"
    assert out.frames.shape == (20, 64, 64, 3)
    np.testing.assert_array_equal(out.frames, read_video(out.path)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.png"]


def test_a_stream_gives_the_frames_of_a_call_as_they_are_decoded(
    world: World, pipe: talkingdit.TalkingPipeline, whole: np.ndarray
) -> None:
    """A latent's four frames each, before the next clip is begun, with their places and their sound."""
    steps: list[int] = []
    spans, seen = [], []
    for span in pipe.stream(**world.given, progress=lambda done, of: steps.append(done)):
        spans.append(span)
        seen.append(steps[-1])
    assert [len(span) for span in spans] == [4, 4, 4, 4, 4]
    assert seen == [2, 2, 4, 4, 6]
    assert [span.start for span in spans] == [0, 4, 8, 12, 16]
    assert spans[1].seconds == (0.25, 0.5)
    np.testing.assert_array_equal(np.concatenate(spans), whole)
    assert (spans[0].shape, spans[0].dtype, spans[0][0].shape) == ((4, 32, 32, 3), np.uint8, (32, 32, 3))
    samples = [span.audio[0] for span in spans]
    assert [len(heard) for heard in samples] == [4000] * 5  # as many as a quarter of a second has
    np.testing.assert_array_equal(np.concatenate(samples)[:, 0], world.voice)


def test_a_closed_stream_stops_and_leaves_nothing(
    world: World, pipe: talkingdit.TalkingPipeline, whole: np.ndarray, scratch: Path
) -> None:
    steps: list[tuple[int, int]] = []
    stream = pipe.stream(**world.given, progress=lambda *done: steps.append(done))
    assert any(scratch.rglob("*.png"))
    np.testing.assert_array_equal(next(stream), whole[:4])
    stream.close()
    assert steps[-1] == (2, 6)
    assert not any(scratch.iterdir())


def test_nothing_is_left_of_a_call_once_its_result_is_forgotten(
    world: World, pipe: talkingdit.TalkingPipeline, scratch: Path
) -> None:
    out = pipe(**world.given)
    frames = out.frames
    assert any(scratch.iterdir())
    del out
    gc.collect()
    assert not any(scratch.iterdir())
    assert frames.any()  # they are held by themselves


def test_what_a_program_holds_is_what_files_hold(
    world: World, pipe: talkingdit.TalkingPipeline, whole: np.ndarray, tmp_path: Path
) -> None:
    turned = Image.fromarray(world.face).rotate(90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it upright
    turned.save(tmp_path / "turned.png", exif=exif)
    samples = np.stack([world.voice, world.voice], axis=1)
    for image, audio in (
        (world.folder / "face.png", str(world.folder / "voice.wav")),
        (Image.open(tmp_path / "turned.png"), (samples, RATE)),
        (torch.from_numpy(world.face), (torch.from_numpy(world.voice), np.int64(RATE))),
    ):
        np.testing.assert_array_equal(pipe(image, audio, "a person").frames, whole)


def test_the_sound_is_that_of_the_recording(world: World, pipe: talkingdit.TalkingPipeline, tmp_path: Path) -> None:
    stereo = np.stack([world.voice, -0.5 * world.voice], axis=1)
    soundfile.write(tmp_path / "stereo.wav", stereo[:8000], 8000, subtype="FLOAT")
    samples, rate = pipe(world.face, tmp_path / "stereo.wav", steps=1).audio
    assert rate == 8000
    np.testing.assert_array_equal(samples, stereo[:8000])


def test_a_sheet_is_drawn(world: World, pipe: talkingdit.TalkingPipeline, tmp_path: Path) -> None:
    target = pipe(**world.given, steps=1).sheet(tmp_path / "out.png")
    assert Image.open(target).size[0] > 100


def test_it_tells_what_it_is(world: World, pipe: talkingdit.TalkingPipeline) -> None:
    assert pipe.family.name == "puppet"
    assert sorted(pipe.components) == ["text_encoder", "transformer", "vae"]
    assert pipe.transformer is pipe.components["transformer"]
    assert pipe.options is pipe.family.options
    assert "WanS2VModel" in repr(pipe)
    with pytest.raises(AttributeError, match="no attribute 'unet'"):
        _ = pipe.unet


def test_another_dtype_is_that_of_loading(world: World, pipe: talkingdit.TalkingPipeline, whole: np.ndarray) -> None:
    loaded = talkingdit.TalkingPipeline.from_pretrained(world.checkpoint, torch_dtype=torch.bfloat16)
    narrow = loaded(**world.given).frames
    assert pipe.to(torch.bfloat16) is pipe
    assert pipe.dtype == torch.bfloat16
    np.testing.assert_array_equal(pipe(**world.given).frames, narrow)
    np.testing.assert_array_equal(pipe.to("cpu", torch.float32)(**world.given).frames, whole)
    assert (narrow != whole).any()
