# SPDX-License-Identifier: Apache-2.0
"""The command as a user runs it: files in, a video out; one sentence and nothing left when something is wrong."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import soundfile
from forked import run, start
from tiny_checkpoint import make_checkpoint

from talkingdit.cli.main import main
from talkingdit.media.files import VideoWriter, read_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a portrait and 1.3 s of sound with a click every 0.4 s, 44.1 kHz stereo."""
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "portrait.png"), image)
    sound = 0.01 * np.random.default_rng(1).normal(size=(57330, 2))
    for click in (0.4, 0.8, 1.2):
        sound[int(click * 44100) : int(click * 44100) + 400] += 0.5 * np.sin(np.arange(400) * 0.3)[:, None]
    soundfile.write(tmp_path / "voice.wav", sound, 44100)
    return tmp_path


def arguments(work: Path, checkpoint: Path, *more: str, output: str = "out.mp4") -> list[str]:
    files = ["--image", str(work / "portrait.png"), "--audio", str(work / "voice.wav"), "-o", str(work / output)]
    return ["generate", *files, "--checkpoint", str(checkpoint), *more]


def frames_of(path: Path) -> np.ndarray:
    return read_video(path)[0]


def left(work: Path) -> set[str]:
    return {path.name for path in work.iterdir()}


def test_a_portrait_and_a_voice_become_a_video(
    work: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = work / "sheet.png"
    prompt = "a person, happy, zorbing and quuxing"
    assert main(arguments(work, checkpoint, "--prompt", prompt, "--sheet", str(sheet), "--upscale", "2")) == 0
    said = capsys.readouterr()
    assert re.search(r"out\.mp4: 21 frames, 1\.31 s of video at 16 fps, made in [0-9.]+ s", said.out)
    assert "portrait.png is 64 x 48 pixels; only its middle square is used." in said.err
    assert "words that this model does not know: zorbing, quuxing." in said.err
    assert left(work) == {"portrait.png", "voice.wav", "out.mp4", "sheet.png"}
    assert min(cv2.imread(str(sheet)).shape[:2]) > 100
    assert frames_of(work / "out.mp4").shape == (21, 64, 64, 3)


def test_sound_in_the_video_is_the_voice_at_its_own_time_and_rate(work: Path, checkpoint: Path) -> None:
    assert main(arguments(work, checkpoint)) == 0
    with av.open(str(work / "out.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name, audio.rate) == ("h264", "aac", 44100)
        assert video.average_rate == 16
        first = next(container.decode(video=0))
        assert float(first.time) == pytest.approx(0.0, abs=1e-3)
    times, samples = [], []
    with av.open(str(work / "out.mp4")) as container:
        for frame in container.decode(audio=0):
            values = frame.to_ndarray().mean(0)
            samples.append(values)
            times.append(float(frame.time) + np.arange(len(values)) / frame.rate)
    sound, at = np.concatenate(samples), np.concatenate(times)
    for click in (0.4, 0.8, 1.2):
        near = np.abs(at - click) < 0.15
        loud = np.abs(sound[near]) > 0.5 * np.abs(sound[near]).max()
        assert at[near][loud][0] == pytest.approx(click, abs=0.004)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The frames of all videos as they were before compression, which x264 does not do the same way every time."""
    frames: list[np.ndarray] = []
    write = VideoWriter.write

    def recorded(self: VideoWriter, more: np.ndarray) -> None:
        frames.append(more)
        write(self, more)

    monkeypatch.setattr(VideoWriter, "write", recorded)
    return frames


def test_one_seed_gives_the_same_frames_another_seed_others(
    work: Path, checkpoint: Path, written: list[np.ndarray]
) -> None:
    videos = []
    for name, seed in (("a.mp4", "3"), ("b.mp4", "3"), ("c.mp4", "4")):
        written.clear()
        assert main(arguments(work, checkpoint, "--seed", seed, "--steps", "1", output=name)) == 0
        videos.append(np.concatenate(written).astype(int))
    assert videos[0].shape == (21, 32, 32, 3)
    np.testing.assert_array_equal(videos[0], videos[1])
    assert np.abs(videos[0] - videos[2]).mean() > 2


def test_guidance_changes_the_frames(work: Path, checkpoint: Path) -> None:
    for name, strength in (("a.mp4", "1"), ("b.mp4", "6")):
        assert main(arguments(work, checkpoint, "--audio-guidance", strength, output=name)) == 0
    assert (frames_of(work / "a.mp4") != frames_of(work / "b.mp4")).any()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a refused call."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    assert said.err.count("\n") == 1
    assert said.err.startswith("talkingdit")
    return said.err


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("portrait.png", None),
        ("portrait.png", b""),
        ("portrait.png", b"not a picture"),
        ("voice.wav", None),
        ("voice.wav", b""),
        ("voice.wav", b"not a sound at all"),
    ],
)
def test_files_that_are_missing_or_broken(
    work: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes | None
) -> None:
    if content is None:
        (work / file).unlink()
    else:
        (work / file).write_bytes(content)
    before = left(work)
    assert file in refused(arguments(work, checkpoint), capsys)
    assert left(work) == before


def test_silence_is_refused(work: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(work / "voice.wav", np.zeros(16000), 16000)
    assert "silen" in refused(arguments(work, checkpoint), capsys)
    assert left(work) == {"portrait.png", "voice.wav"}


def test_targets_that_cannot_be_written(work: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(arguments(work, checkpoint, output="nowhere/out.mp4"), capsys)
    assert "expected a name that ends in .mp4, got '.txt'" in refused(
        arguments(work, checkpoint, output="out.txt"), capsys
    )
    (work / "folder.mp4").mkdir()
    assert "folder.mp4" in refused(arguments(work, checkpoint, output="folder.mp4"), capsys)
    sheet = str(work / "nowhere" / "sheet.png")
    assert "nowhere" in refused(arguments(work, checkpoint, "--sheet", sheet), capsys)
    assert left(work) == {"portrait.png", "voice.wav", "folder.mp4"}


def test_a_checkpoint_that_is_not_one(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Gloria, got a folder with none of their files" in (refused(arguments(work, work), capsys))
    assert "must be a folder" in refused(arguments(work, work / "none"), capsys)
    (work / "half").mkdir()
    (work / "half" / "pipeline.json").write_text('{"clip_latents": 8}')
    assert "the folder transformer/ is missing" in refused(arguments(work, work / "half"), capsys)
    assert left(work) == {"portrait.png", "voice.wav", "half"}


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--steps", "0", "--steps must be at least 1, got 0"),
        ("--steps", "many", "argument --steps: invalid integer value: 'many'"),
        ("--seed", "-1", "--seed must be at least 0, got -1"),
        ("--audio-guidance", "nan", "--audio-guidance must be a number of at least 0, got nan"),
        ("--text-guidance", "-2", "--text-guidance must be a number of at least 0, got -2.0"),
        ("--upscale", "0", "--upscale must be at least 1, got 0"),
        ("--upscale", "1000", "--upscale must be at most"),
        ("--speed", "3", "unrecognized arguments: --speed 3"),
    ],
)
def test_impossible_options(
    work: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, sentence: str
) -> None:
    assert sentence in refused(
        arguments(
            work, checkpoint, f"{option}={value}" if value[0] == "-" else option, *([value] if value[0] != "-" else [])
        ),
        capsys,
    )


def test_a_failure_in_the_middle_leaves_nothing(work: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from talkingdit.families.puppet.pipeline import PuppetPipeline

    def broken(*_: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PuppetPipeline, "denoised", broken)
    assert main(arguments(work, checkpoint, "--sheet", str(work / "sheet.png"))) == 130
    assert left(work) == {"portrait.png", "voice.wav"}


def test_an_existing_video_survives_a_failure(work: Path, checkpoint: Path) -> None:
    (work / "out.mp4").write_bytes(b"precious")
    (work / "voice.wav").write_bytes(b"broken")
    assert main(arguments(work, checkpoint)) == 2
    assert (work / "out.mp4").read_bytes() == b"precious"


def hears_interrupts(words: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may run its jobs deaf to Ctrl-C
    return main(words)


def test_an_interrupt_is_one_line_and_leaves_whole_clips_at_most(
    work: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    soundfile.write(work / "voice.wav", 0.1 * np.random.default_rng(0).normal(size=16000 * 120), 16000)
    messages = tmp_path_factory.mktemp("said") / "messages"
    process = start(hears_interrupts, arguments(work, checkpoint), said=messages)
    deadline = time.monotonic() + 120
    parts = work / "out.mp4.parts"  # with a clip in it: libraries swallow interrupts while they are being imported
    while not any(parts.glob("clip-*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    errors = messages.read_text()
    assert "Traceback" not in errors
    *_, last = errors.rstrip().splitlines()
    if left(work) == {"portrait.png", "voice.wav"}:
        assert last.endswith("talkingdit: interrupted; nothing was written.")
    else:
        assert left(work) == {"portrait.png", "voice.wav", "out.mp4.parts"}
        assert re.search(r"talkingdit: interrupted; [1-9]\d* of \d+ clips are kept in .*out\.mp4\.parts", last)


def test_info_says_what_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for word in ("version", "torch", "cpu isa", "cuda", "threads", "bfloat16 on the CPU"):
        assert re.search(rf"^{word} +\S", said, re.MULTILINE), word


@pytest.mark.parametrize("fast", [True, False])
def test_a_dtype_that_takes_several_times_as_long_is_said(
    work: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fast: bool
) -> None:
    monkeypatch.setattr("talkingdit.nn.bfloat16._instructions", lambda: "avx512_bf16" if fast else "avx2")
    given = ["--image", str(work / "portrait.png"), "--audio", str(work / "voice.wav"), "--checkpoint", str(checkpoint)]
    for dtype in ("bfloat16", "float32"):
        more = ["--output", str(work / f"{dtype}.mp4"), "--steps", "1", "--dtype", dtype]
        assert main(["generate", *given, *more]) == 0
        said = "--dtype bfloat16: this processor has no instructions for it" in capsys.readouterr().err
        assert said == (dtype == "bfloat16" and not fast)


def test_a_spoken_voice_becomes_a_video_on_standard_output(work: Path, checkpoint: Path) -> None:
    """Raw sound in, a video out: nothing else on standard output, the sentence on the other one, nothing left."""
    voice = (0.1 * np.random.default_rng(1).normal(size=20000) * 2**15).astype("<i2")
    command = [sys.executable, "-m", "talkingdit", "generate", "--image", str(work / "portrait.png")]
    command += ["--checkpoint", str(checkpoint), "--audio", "-", "--audio-rate", "16000", "-o", "-", "--steps", "1"]
    done = subprocess.run(command, input=voice.tobytes(), capture_output=True, timeout=300)
    assert done.returncode == 0
    with av.open(io.BytesIO(done.stdout)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 20
    said = done.stderr.decode()
    assert re.search(r"standard output: 20 frames, 1\.25 s .* the first frame after [0-9.]+ s", said)
    assert left(work) == {"portrait.png", "voice.wav"}
    assert run(main, command[3:], said=work / "said") == 2  # with nothing to hear
    (sentence,) = (work / "said").read_text().splitlines()
    assert "audio -: expected sound" in sentence
