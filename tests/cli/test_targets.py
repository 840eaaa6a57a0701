# SPDX-License-Identifier: Apache-2.0
"""Any name works, nothing that is read is written over, and a run that was ended says what it kept."""

from __future__ import annotations

import io
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import soundfile
from forked import run
from PIL import Image
from tiny_checkpoint import make_checkpoint

from talkingdit.cli.main import main
from talkingdit.data.manifest import read_manifest
from talkingdit.errors import UserError
from talkingdit.families.puppet.pipeline import PuppetPipeline
from talkingdit.media.files import VideoWriter, read_audio, read_image, read_video
from talkingdit.media.pose import PoseVideo
from talkingdit.media.sheet import preview_sheet


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a portrait and two seconds of voice: four clips."""
    cv2.imwrite(str(tmp_path / "face.png"), np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    soundfile.write(tmp_path / "voice.wav", 0.1 * np.random.default_rng(1).normal(size=32000), 16000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(checkpoint: Path, *more: str, image: str = "face.png", audio: str = "voice.wav", output: str) -> int:
    files = ["--image", image, "--audio", audio, "-o", output]
    return main(["generate", *files, "--checkpoint", str(checkpoint), "--steps", "1", *more])


def status_of(function: Callable[..., int], *given: Any, **more: Any) -> Any:
    try:
        return function(*given, **more)
    except SystemExit as stop:
        return stop.code


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


ADDRESSES = ("2025-11-27T12:30.mp4", "http:x.mp4", "file:y.mp4", "-dash.mp4", "50%d #1?.mp4", "ünïcödé 名.mp4")


def test_any_name_can_be_written_and_read(work: Path, checkpoint: Path) -> None:
    """Relative names that look like addresses, of images, voices, videos, previews and finished clips."""
    (work / "face.png").rename(work / "data:face.png")
    sound = {"voice:1.wav": "WAV", "concat:a|b.flac": "FLAC"}
    samples, rate = soundfile.read(work / "voice.wav")
    for name, kind in sound.items():
        with open(name, "wb") as file:
            soundfile.write(file, samples, rate, format=kind)
    made = set()
    for name, voice in zip(ADDRESSES[:2], sound, strict=True):
        files = {"image": "data:face.png", "audio": voice, "output": name}
        assert call(checkpoint, "--sheet", f"sheet:{name}.png", **files) == 0
        assert len(read_video(name)[0]) == 32
        made |= {name, f"sheet:{name}.png"}
    assert left(work) == {"data:face.png", "voice.wav", *sound, *made}


@pytest.mark.parametrize("name", ADDRESSES)
def test_any_name_of_a_video_or_of_its_sound(work: Path, name: str) -> None:
    frames = np.zeros((8, 32, 32, 3), np.uint8)
    with VideoWriter(name, 16, (32, 32), "voice.wav") as video:
        video.write(frames)
    assert read_video(name)[0].shape == frames.shape
    assert 8000 <= len(read_audio(name)) < 8000 + 1024
    assert next(PoseVideo(name, 16).clips(4, (32, 32))).shape == (1, 3, 4, 32, 32)
    other = "voice:1.m4a"
    os.rename(name, other)
    assert len(read_audio(other)) >= 8000


def test_a_playlist_leads_nowhere(work: Path) -> None:
    with VideoWriter("secret.mp4", 16, (32, 32), "voice.wav") as video:
        video.write(np.zeros((16, 32, 32, 3), np.uint8))
    target = work / "secret.mp4"
    Path("list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{target}\n#EXT-X-ENDLIST\n")
    for read in (read_audio, read_video, lambda path: PoseVideo(path, 16)):
        with pytest.raises(UserError):
            read("list.m3u8")


def link(old: str, new: str) -> str:
    os.symlink(old, new)
    return new


def hard(old: str, new: str) -> str:
    os.link(old, new)
    return new


def in_folder(old: str, new: str) -> str:
    os.symlink(".", "here")
    return f"here/{old}"


def plain(old: str, new: str) -> str:
    return f"./{old}"


@pytest.mark.parametrize("way", [plain, link, hard, in_folder])
@pytest.mark.parametrize("what", ["output is audio", "sheet is image", "output is pose"])
def test_nothing_that_is_read_is_written_over(
    work: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[str, str], str],
    what: str,
) -> None:
    monkeypatch.setattr("talkingdit.pipelines.inputs.read_image", lambda _: pytest.fail("read"))
    target, _, source = what.split()
    (work / "in.mp4").write_bytes(b"precious")
    (work / "face.png").rename(work / "in.png")
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    given = {"image": "in.png", "audio": "in.mp4" if source == "audio" else "voice.wav", "output": "out.mp4"}
    more: list[str] = []
    if target == "output":
        given["output"] = way("in.mp4", "other.mp4")
    else:
        more = ["--sheet", way("in.png", "other.png")]
    if source == "pose":
        from talkingdit.families.puppet.options import Options

        monkeypatch.setattr(Options, "files", lambda self: {"pose": Path("in.mp4")})
    assert call(checkpoint, *more, **given) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{target} " in said
    assert f"expected a file of its own, got the one given as {source}" in said
    assert all((work / name).read_bytes() == content for name, content in before.items())


@pytest.mark.parametrize("target", ["output", "sheet"])
@pytest.mark.parametrize("source", ["checkpoint", "lora 1"])
def test_no_link_leads_to_weights(work: Path, capsys: pytest.CaptureFixture[str], target: str, source: str) -> None:
    """A preview through a link took the place of a checkpoint's weights."""
    folder = make_checkpoint(work / "model")
    weights = next(folder.rglob("*.safetensors"))
    given = {"output": "out.mp4"}
    more = []
    if source == "lora 1":
        (work / "style.safetensors").write_bytes(b"precious")
        weights, more = work / "style.safetensors", ["--lora", "style.safetensors"]
    before = weights.read_bytes()
    name = "l.mp4" if target == "output" else "l.png"
    (work / name).symlink_to(weights)
    if target == "output":
        given["output"] = name
    else:
        more += ["--sheet", name]
    assert call(folder, *more, **given) == 2
    assert f"expected a file of its own, got the one given as {source}" in capsys.readouterr().err
    assert weights.read_bytes() == before


def test_a_lora_that_is_a_pipe_is_not_waited_for(
    work: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("l.safetensors")
    assert call(checkpoint, "--lora", "l.safetensors", output="out.mp4") == 2
    assert "--lora: expected a file or folder, got a pipe or a device" in capsys.readouterr().err


def test_names_that_are_no_text_are_printed_all_the_same(
    work: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The video was made, and then there was a traceback in place of its name."""
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="utf-8", write_through=True))
    names = [os.fsdecode(name) for name in (b"o\xff.mp4", b"s\xff.png", b"f\xff.png", b"v\xff.wav")]
    (work / "face.png").rename(names[2])
    (work / "voice.wav").rename(names[3])
    assert call(checkpoint, "--sheet", names[1], image=names[2], audio=names[3], output=names[0]) == 0
    assert rb"o\udcff.mp4: 32 frames" in printed.getvalue()
    assert rb"s\udcff.png" in printed.getvalue()
    assert left(work) == set(names)


def test_two_results_do_not_go_into_one_file(work: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.symlink("out.mp4", "sheet.png")  # also where nothing is there yet
    assert call(checkpoint, "--sheet", "sheet.png", output="out.mp4") == 2
    assert "expected a file of its own, got the one given as output" in capsys.readouterr().err
    assert call(checkpoint, "--sheet", "out.mp4", output="out.mp4") == 2
    assert "expected a name that ends in .png" in capsys.readouterr().err
    assert left(work) == {"face.png", "voice.wav", "sheet.png"}


def test_a_calibration_takes_no_file_of_others(
    work: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "voice.json").symlink_to("voice.wav")
    config = checkpoint / "pipeline.json"
    before = config.read_bytes(), (work / "voice.wav").read_bytes()
    for target, said in (
        ("voice.wav", "ends in .json"),
        ("voice.json", "expected a file of its own, got the one given as audio"),
        (str(config), "expected a file of its own, got the one given as checkpoint (pipeline.json)"),
    ):
        files = ["--image", "face.png", "--audio", "voice.wav", "-o", target, "--checkpoint", str(checkpoint)]
        assert main(["calibrate", *files]) == 2
        assert said in capsys.readouterr().err
    assert before == (config.read_bytes(), (work / "voice.wav").read_bytes())


@pytest.mark.parametrize("verb", ["generate", "calibrate"])
def test_two_runs_do_not_make_one_preview_or_calibration(
    work: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Of two videos with one preview that of the first would be gone; the second is told before it computes."""
    files = ["--image", "face.png", "--audio", "voice.wav", "--checkpoint", str(checkpoint), "--steps", "3"]
    targets = {"generate": ["-o", "second.mp4", "--sheet", "link.png"], "calibrate": ["-o", "link.json"]}[verb]
    (work / "link.png").symlink_to("result.png")
    (work / "link.json").symlink_to("result.json")
    first = {"generate": ["-o", "first.mp4", "--sheet", "result.png"], "calibrate": ["-o", "result.json"]}[verb]
    denoised, said = PuppetPipeline.denoised, []

    def met(self: Any, conditions: Any, index: int, *given: Any, **more: Any) -> Any:
        if not said:
            said.append("")
            assert main([verb, *files, *targets]) == 2  # on its way another run comes by
            said.append(capsys.readouterr().err.strip().splitlines()[-1])
        return denoised(self, conditions, index, *given, **more)

    monkeypatch.setattr(PuppetPipeline, "denoised", met)
    assert main([verb, *files, *first]) == 0
    assert said[1].startswith(f"talkingdit: {targets[-1]}: another run (talkingdit {verb}, process {os.getpid()} on ")
    made = {"generate": {"first.mp4", "result.png"}, "calibrate": {"result.json"}}[verb]
    assert left(work) == {"face.png", "voice.wav", "link.png", "link.json"} | made


def test_what_is_hidden_in_a_checkpoint_throws_no_clips_away(
    work: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file browser, a download or a calibration leaves such files there while a video waits to be gone on with."""
    clip = PuppetPipeline.denoised

    def ended(self: Any, conditions: Any, index: int, *given: Any, **more: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return clip(self, conditions, index, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(PuppetPipeline, "denoised", ended)
        assert call(checkpoint, output="out.mp4") == 130
    hidden = [checkpoint / ".DS_Store", checkpoint / ".cache" / "huggingface" / "download.metadata"]
    for file in hidden:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("theirs")
    try:
        assert call(checkpoint, "--resume", output="out.mp4") == 0
        assert "going on after 2 of 4 clips" in capsys.readouterr().err
    finally:
        for file in hidden:
            file.unlink()


def test_every_file_among_the_options_counts(tmp_path: Path) -> None:
    from talkingdit.families.wan_s2v.options import Options

    assert Options(pose=tmp_path / "pose.mp4").files() == {"pose": tmp_path / "pose.mp4"}
    assert Options().files() == {}


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "x" * 245 + ".mp4", "名" * 84 + ".mp4"])
def test_a_name_that_is_too_long(work: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Also one that has no room for the names beside it, which begin alike."""
    for given in ({"output": name}, {"output": "out.mp4", "audio": name}, {"output": "out.mp4", "image": name}):
        assert status_of(call, checkpoint, **given) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "Traceback" not in said
    assert left(work) == {"face.png", "voice.wav"}


def test_the_longest_name_works(work: Path, checkpoint: Path) -> None:
    name = "x" * (239 - 4) + ".mp4"
    assert call(checkpoint, output=name) == 0
    assert left(work) == {"face.png", "voice.wav", name}


def test_a_nul_in_a_manifest_is_one_sentence(tmp_path: Path) -> None:
    for name, row in {
        "a.jsonl": '{"video": "a\\u0000b.mp4"}\n',
        "a.json": '[{"video": "a.mp4", "audio": "v\\u0000.wav"}]',
        "a.csv": "video,reference\na.mp4,f\0.png\n",
    }.items():
        (tmp_path / name).write_text(row)
        with pytest.raises(UserError) as caught:
            read_manifest(tmp_path / name)
        assert "NUL" in str(caught.value) or "not a row of csv" in str(caught.value)
        assert "\n" not in str(caught.value)
    for read in (read_audio, read_image, read_video):
        with pytest.raises(UserError, match="expected an existing file"):
            read("a\0b")
        with pytest.raises(UserError, match="expected an existing file"):
            read("x" * 300)
    with pytest.raises(UserError, match="NUL"):
        VideoWriter("a\0b.mp4", 16, (32, 32))


def killed(what: str) -> None:
    if what == "video":
        writer = VideoWriter("out.mp4", 16, (32, 32))
        writer.write(np.zeros((20, 32, 32, 3), np.uint8))
        os.kill(os.getpid(), signal.SIGKILL)
    Image.Image.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    preview_sheet(np.zeros((2, 32, 32, 3), np.uint8), np.zeros(16000, np.float32), 16000, 16, {}, "sheet.png")


def test_what_killed_runs_left_is_removed_by_the_next_of_the_same_target(work: Path, checkpoint: Path) -> None:
    for what in ("video", "video", "sheet"):
        assert run(killed, what) == -signal.SIGKILL
    assert 2 <= len([name for name in left(work) if name.endswith(".part")]) <= 3
    assert call(checkpoint, "--sheet", "sheet.png", output="out.mp4") == 0
    assert left(work) == {"face.png", "voice.wav", "out.mp4", "sheet.png"}


def test_results_have_the_usual_mode_and_follow_links(work: Path, checkpoint: Path) -> None:
    (work / "far").mkdir()
    for name in ("out.mp4", "sheet.png"):
        os.symlink(f"far/{name}", name)
    before = os.umask(0o027)
    try:
        assert call(checkpoint, "--sheet", "sheet.png", output="out.mp4") == 0
    finally:
        os.umask(before)
    for name in ("out.mp4", "sheet.png"):
        assert Path(name).is_symlink()
        assert stat.S_IMODE((work / "far" / name).stat().st_mode) == 0o640
    assert left(work / "far") == {"out.mp4", "sheet.png"}


@pytest.mark.parametrize(("at", "kept"), [(0, "nothing was written."), (2, "2 of 4 clips are kept in out.mp4.parts;")])
def test_sigterm_says_what_is_kept_and_how_to_go_on(
    work: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    kept: str,
) -> None:
    clip = PuppetPipeline.denoised
    before = signal.getsignal(signal.SIGTERM)

    def ended(self: Any, conditions: Any, index: int, *given: Any, **more: Any) -> Any:
        if index == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(self, conditions, index, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(PuppetPipeline, "denoised", ended)
        assert call(checkpoint, output="out.mp4") == 130
    assert signal.getsignal(signal.SIGTERM) == before
    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1].startswith(f"talkingdit: interrupted; {kept}")
    assert ("the same command goes on there" in said) == bool(at)
    assert left(work) == {"face.png", "voice.wav"} | ({"out.mp4.parts"} if at else set())
    assert call(checkpoint, output="out.mp4") == 0
    assert ("going on after 2 of 4 clips" in capsys.readouterr().err) == bool(at)
    assert left(work) == {"face.png", "voice.wav", "out.mp4"}
