# SPDX-License-Identifier: Apache-2.0
"""The road of a video job: resume, progress and warnings are the same for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import soundfile
import torch
from tiny_checkpoint import make_checkpoint

import talkingdit
from talkingdit.errors import UserError
from talkingdit.families.puppet.pipeline import PuppetPipeline
from talkingdit.media.files import VideoWriter, read_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    cv2.imwrite(str(tmp_path / "face.png"), np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    soundfile.write(tmp_path / "voice.wav", 0.1 * np.random.default_rng(1).normal(size=32000), 16000)
    return tmp_path


def make(work: Path, checkpoint: Path, output: str = "out.mp4", **more: Any) -> np.ndarray:
    """Frames before their compression, of which x264 may make another one of equal frames."""
    written: list[np.ndarray] = []
    write = VideoWriter.write

    def record(self: VideoWriter, frames: np.ndarray) -> None:
        written.append(frames)
        write(self, frames)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoWriter, "write", record)
        result = talkingdit.generate(
            work / "face.png", work / "voice.wav", work / output, prompt="a person", checkpoint=checkpoint, **more
        )
    assert result.path == work / output
    assert result.frames == 32  # two seconds, four clips of eight frames
    assert len(read_video(result.path)[0]) == 32
    return np.concatenate(written)


@pytest.mark.parametrize("threads", [1, 2])  # with two, a clip is decoded while the next one is denoised
def test_a_drawn_character_goes_on_after_its_finished_clips_as_if_never_interrupted(
    work: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    torch.set_num_threads(threads)
    whole = make(work, checkpoint)
    denoised, made = PuppetPipeline.denoised, []

    def interrupted(self: Any, conditions: Any, index: int, *given: Any, **more: Any) -> Any:
        if index == 3:
            raise KeyboardInterrupt
        made.append(index)
        return denoised(self, conditions, index, *given, **more)

    monkeypatch.setattr(PuppetPipeline, "denoised", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"3 of 4 clips are kept in .*again.mp4.parts; the same command"):
        make(work, checkpoint, "again.mp4")
    monkeypatch.setattr(
        PuppetPipeline, "denoised", lambda self, *given, **more: made.append(given[1]) or denoised(self, *given, **more)
    )
    said: list[str] = []
    steps: list[tuple[int, int]] = []
    again = make(work, checkpoint, "again.mp4", warn=said.append, progress=lambda *done: steps.append(done))
    assert made == [0, 1, 2, 3]
    np.testing.assert_array_equal(again, whole)
    assert [sentence.partition(" that")[0] for sentence in said] == ["going on after 3 of 4 clips"]
    total = steps[-1][1]
    assert steps[0][0] == 3 * total // 4 + 1
    assert steps[-1] == (total, total)
    assert not (work / "again.mp4.parts").exists()


def test_finished_clips_of_other_settings_are_not_gone_on_from(
    work: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoised = PuppetPipeline.denoised

    def interrupted(self: Any, conditions: Any, index: int, *given: Any, **more: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return denoised(self, conditions, index, *given, **more)

    monkeypatch.setattr(PuppetPipeline, "denoised", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(work, checkpoint)
    monkeypatch.setattr(PuppetPipeline, "denoised", denoised)
    with pytest.raises(UserError, match=r"made with another seed, and its clips .1. are to be kept: give what"):
        make(work, checkpoint, seed=1, resume=True)
    said: list[str] = []
    make(work, checkpoint, seed=1, warn=said.append)
    assert said == [f"{work / 'out.mp4'}.parts was made with another seed; starting over."]


def test_impossible_options_and_files_are_refused_before_a_model_is_loaded(
    work: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("talkingdit.api.once.load_checkpoint", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        make(work, checkpoint, steps=0)
    with pytest.raises(UserError, match="expected a name that ends in"):
        make(work, checkpoint, "out.avi")
    (work / "voice.wav").unlink()
    with pytest.raises(UserError, match="expected an existing file"):
        make(work, checkpoint)


def test_a_program_may_ask_for_eight_bits_and_a_kernel(work: Path, checkpoint: Path) -> None:
    plain, other = make(work, checkpoint), make(work, checkpoint, precision="int8", attention="math")
    difference = np.abs(plain.astype(int) - other.astype(int))
    assert 0 < difference.mean() < 12


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"precision": "int4"}, "precision must be one of fp8, int8, got 'int4'"),
        ({"attention": "fast"}, "attention must be one of auto, flash, .*, got 'fast'"),
        ({"attention": "sage"}, "backend sage"),
    ],
)
def test_a_program_is_told_what_cannot_be(work: Path, checkpoint: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(work, checkpoint, **more)
    assert not (work / "out.mp4").exists()


def test_a_checkpoint_that_is_loaded_is_not_changed(work: Path, checkpoint: Path) -> None:
    loaded = talkingdit.models.load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="expected the folder of a checkpoint with them, got one that is loaded"):
        make(work, loaded, precision="fp8")
