# SPDX-License-Identifier: Apache-2.0
"""The command with a folder in the layout of the released Wan2.2-S2V: a video, resumed where it was killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import soundfile
from forked import run
from official import make_official

from talkingdit.cli.main import main
from talkingdit.media.files import VideoWriter, read_video
from talkingdit.pipelines import inputs

SECONDS = 1.4  # 23 frames: three clips of eight


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_official(tmp_path_factory.mktemp("checkpoint") / "Wan2.2-S2V-tiny", vae_dim=4)


def make_inputs(tmp_path: Path) -> None:
    """A portrait and a voice."""
    image = np.random.default_rng(0).integers(0, 255, (60, 70, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "face.png"), cv2.GaussianBlur(image, (9, 9), 3))
    sound = 0.2 * np.sin(np.arange(int(SECONDS * 16000)) * 0.08) * (np.arange(int(SECONDS * 16000)) % 4000 < 2000)
    soundfile.write(tmp_path / "voice.wav", sound, 16000)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    make_inputs(tmp_path)
    return tmp_path


def arguments(work: Path, folder: Path, *more: str, output: str = "out.mp4") -> list[str]:
    files = ["--image", str(work / "face.png"), "--audio", str(work / "voice.wav"), "-o", str(work / output)]
    small = ["--max-area", "64x64", "--clip-frames", "8", "--steps", "1"]
    return ["generate", *files, "--checkpoint", str(folder), "--prompt", "a person talking", *small, *more]


def left(work: Path) -> set[str]:
    return {path.name for path in work.iterdir()} - {"face.png", "voice.wav"}


def frames_of(path: Path) -> np.ndarray:
    return read_video(path)[0]


def test_an_official_folder_makes_a_video(work: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(work, folder, "--sheet", str(work / "sheet.png"))) == 0
    said = capsys.readouterr()
    assert "out.mp4: 23 frames, 1.44 s of video at 16 fps" in said.out
    assert left(work) == {"out.mp4", "sheet.png"}
    video = frames_of(work / "out.mp4")
    assert video.shape == (23, 64, 64, 3)
    assert (np.abs(video[3:].astype(int) - video[4:6].mean(0)) > 3).any()
    with av.open(str(work / "out.mp4")) as container:
        assert container.streams.audio[0].rate == 16000
        assert float(container.streams.audio[0].duration * container.streams.audio[0].time_base) > 1.3


def test_a_voice_from_a_pipe_is_seen_while_it_is_spoken(
    work: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raw samples that stall until the first clip can be watched, and the same sound at once in a container."""
    rng = np.random.default_rng(0)  # heard all the time: the level is that of three seconds with sound
    sound = (3000 * rng.standard_normal(16000 * 18 // 5)).astype(np.int16)
    soundfile.write(work / "voice.wav", sound, 16000)
    spoken, watched = (work / "voice.wav").read_bytes(), []
    raw, heard = sound.astype("<i2").tobytes(), 2 * 16000 * 13 // 4  # bytes

    def slowly(pipe: int) -> None:
        _put(pipe, raw[:heard])
        until = time.monotonic() + 60
        while not (work / "slow.mp4").exists() and time.monotonic() < until:
            time.sleep(0.05)
        watched.append(len(frames_of(work / "slow.mp4")))
        _put(pipe, raw[heard:])

    for output, say, more in (
        ("slow.mp4", slowly, ["--audio-rate", "16000"]),
        ("fast.mp4", lambda pipe: _put(pipe, spoken), []),
    ):
        out, into = os.pipe()
        monkeypatch.setattr(inputs, "STANDARD_INPUT", out)
        speaker = threading.Thread(target=_said, args=(say, into))
        speaker.start()
        status = main([*arguments(work, folder, *more, output=output), "--audio", "-"])
        speaker.join()
        assert status == 0
        assert f"{output}: 58 frames, 3.62 s of video at 16 fps" in capsys.readouterr().out
    assert 0 < watched[0] < 58
    assert left(work) == {"slow.mp4", "fast.mp4"}
    slow = frames_of(work / "slow.mp4")
    assert slow.shape == (58, 64, 64, 3)
    np.testing.assert_array_equal(slow, frames_of(work / "fast.mp4"))


def _put(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


def _said(say: Callable[[int], object], pipe: int) -> None:
    try:
        say(pipe)
    finally:
        os.close(pipe)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The video of a run that nobody stopped."""
    work = tmp_path_factory.mktemp("whole")
    make_inputs(work)
    assert main(arguments(work, folder)) == 0
    return work / "out.mp4"


def killed_at_the_second_clip(words: list[str]) -> int:
    from talkingdit.families.wan_s2v.pipeline import WanS2VPipeline

    denoise = WanS2VPipeline._denoise

    def killed(self: WanS2VPipeline, conditions: Any, index: int, *rest: Any) -> Any:
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return denoise(self, conditions, index, *rest)

    WanS2VPipeline._denoise = killed  # type: ignore[method-assign]
    return main(words)


def test_a_run_that_was_killed_goes_on_to_the_same_video(
    work: Path, folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(killed_at_the_second_clip, arguments(work, folder)) == -signal.SIGKILL
    assert {name for name in left(work) if name[0] != "."} == {"out.mp4.parts"}  # beside what the next run removes
    assert main(arguments(work, folder)) == 0
    assert "going on after 1 of 3 clips" in capsys.readouterr().err
    assert left(work) == {"out.mp4"}
    np.testing.assert_array_equal(frames_of(work / "out.mp4"), frames_of(whole))


def test_an_interrupt_says_what_is_kept_and_how_to_go_on(
    work: Path, folder: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from talkingdit.families.wan_s2v.pipeline import WanS2VPipeline

    denoise = WanS2VPipeline._denoise

    def interrupted(self: WanS2VPipeline, conditions: Any, index: int, *rest: Any) -> Any:
        if index == at:
            raise KeyboardInterrupt
        return denoise(self, conditions, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(WanS2VPipeline, "_denoise", interrupted)
        at = 0
        assert main(arguments(work, folder)) == 130
        assert "interrupted; nothing was written." in capsys.readouterr().err
        assert left(work) == set()
        at = 2
        assert main(arguments(work, folder)) == 130
    said = capsys.readouterr().err
    assert f"interrupted; 2 of 3 clips are kept in {work / 'out.mp4.parts'}; the same command goes on there." in said
    assert main(arguments(work, folder)) == 0
    np.testing.assert_array_equal(frames_of(work / "out.mp4"), frames_of(whole))
    assert left(work) == {"out.mp4"}


def test_parts_of_another_request_are_thrown_away(
    work: Path, folder: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from talkingdit.pipelines import job

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job.VideoSink, "finish", stop)
        assert main(arguments(work, folder)) == 130
    assert "3 of 3 clips are kept" in capsys.readouterr().err
    assert main(arguments(work, folder, "--seed", "5", "--clips", "1")) == 0
    assert "was made with another length; starting over." in capsys.readouterr().err
    assert left(work) == {"out.mp4"}
    assert (frames_of(work / "out.mp4") != frames_of(whole)[:8]).any()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a refused call."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("talkingdit")]
    assert "Traceback" not in said.err
    assert len(lines) == 1
    return lines[0]


def test_a_checkpoint_that_is_damaged_says_what_is_wrong(
    work: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_official(tmp_path_factory.mktemp("damaged") / "Wan2.2-S2V-tiny")
    shard = sorted(folder.glob("diffusion_pytorch_model-*.safetensors"))[1]
    shard.rename(shard.with_suffix(".away"))
    assert shard.name in refused(arguments(work, folder), capsys)
    shard.with_suffix(".away").rename(shard)
    (folder / "Wan2.1_VAE.pth").unlink()
    assert "Wan2.1_VAE.pth, the autoencoder, is missing" in refused(arguments(work, folder), capsys)
    assert left(work) == set()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--clip-frames", "10"), "a clip must have a multiple of 4 frames, got 10"),
        (("--guidance", "0.2"), "guidance must be a number of at least 1, got 0.2"),
        (("--shift", "0"), "shift must be a positive number, got 0.0"),
        (("--size", "100x64"), "sides must be multiples of 64, got 100 x 64; the nearest is 128 x 64"),
        (("--size", "wide"), "argument --size: must be WIDTHxHEIGHT in pixels, got 'wide'"),
        (("--max-area", "100"), "does not fit into 100 pixels"),
        (("--pose", "nowhere.mp4"), "pose 'nowhere.mp4': expected an existing file"),
        (("--pose", __file__), "expected a video"),
        (("--audio-guidance", "2"), "--audio-guidance is for checkpoints of drawn characters, "),
        (("--device", "toaster"), "the device 'toaster' cannot be used"),
        (("--memory", "weights=tiny"), "--memory: weights must be one of native, cast_fp8, fp8, int8, got 'tiny'"),
        (("--solver", "heun"), "invalid choice: 'heun'"),
    ],
)
def test_impossible_options(
    work: Path, folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str], sentence: str
) -> None:
    assert sentence in refused(arguments(work, folder, *options), capsys)
    assert left(work) == set()


def test_options_of_wan_say_that_drawn_characters_have_none(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--image", str(work / "face.png"), "--audio", str(work / "voice.wav"), "-o", str(work / "out.mp4")]
    sentence = refused(["generate", *files, "--match-colour"], capsys)
    assert (
        "--match-colour is for checkpoints of Wan-S2V, SkyReels-Audio only, and the shipped one is none of these"
        in sentence
    )


def test_a_folder_of_somebody_else_is_not_touched(work: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "out.mp4.parts").mkdir()
    (work / "out.mp4.parts" / "diary.txt").write_text("mine")
    assert "got 'diary.txt'; move it away" in refused(arguments(work, folder), capsys)
    assert (work / "out.mp4.parts" / "diary.txt").read_text() == "mine"


def test_a_pose_video_that_ends_early_is_told(
    work: Path, folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with VideoWriter(work / "pose.mp4", 16, (64, 64)) as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8))
    assert main(arguments(work, folder, "--pose", str(work / "pose.mp4"))) == 0
    assert "pose.mp4: ends after 0.75 s; the rest follows black frames." in capsys.readouterr().err
    assert (frames_of(work / "out.mp4") != frames_of(whole)).any()


def test_memory_switches_fit_the_checkpoint(work: Path, folder: Path, whole: Path) -> None:
    switches = "weights=cast_fp8,offload=block,text_encoder=cpu,vae=tiled"
    assert main(arguments(work, folder, "--clips", "1", "--memory", switches, "--sequential")) == 0
    narrow, plain = frames_of(work / "out.mp4").astype(int), frames_of(whole)[:8].astype(int)
    assert narrow.shape == plain.shape
    assert (narrow != plain).any()
    assert np.abs(narrow - plain).mean() < 0.3 * plain.std()
