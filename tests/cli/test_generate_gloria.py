# SPDX-License-Identifier: Apache-2.0
"""The command with a folder of Gloria: a video with anchors, resumed where it was killed; and one of Wan I2V."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import soundfile
from forked import run
from tiny_i2v import make_i2v

from talkingdit.cli.main import main
from talkingdit.families.gloria import attention
from talkingdit.lock import alone
from talkingdit.media.files import read_video
from talkingdit.pipelines.resume import ClipStore
from talkingdit.pipelines.write import VideoSink

SECONDS = 1.4  # 23 frames, 7 latents: chunks of 4 latents that share 2 begin at 0, 2 and 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    widths = {"audio_dim": 16, "audio_layers": 25, "audio_width": 12, "audio_inject_layers": (0,)}
    settings = {"prefix_latents": 2, "anchor_area": 32 * 48, "guidance": 2.0, "audio_guidance": 3.0}
    return make_i2v(tmp_path_factory.mktemp("gloria"), "gloria_tiny", settings, **widths)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portrait, anchors and a voice."""
    work = tmp_path_factory.mktemp("media")
    for number, (name, size) in enumerate({"face": (60, 70), "back": (90, 30), "happy": (40, 40)}.items()):
        image = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        cv2.imwrite(str(work / f"{name}.png"), cv2.GaussianBlur(image, (9, 9), 3))
    sound = 0.2 * np.sin(np.arange(int(SECONDS * 16000)) * 0.08) * (np.arange(int(SECONDS * 16000)) % 4000 < 2000)
    soundfile.write(work / "voice.wav", sound, 16000)
    return work


def arguments(media: Path, folder: Path, out: Path, *more: str) -> list[str]:
    files = ["--image", str(media / "face.png"), "--audio", str(media / "voice.wav"), "-o", str(out)]
    return [
        "generate",
        *files,
        "--checkpoint",
        str(folder),
        "--prompt",
        "a person talking",
        "--max-area",
        "64x64",
        *more,
    ]


def anchored(media: Path) -> list[str]:
    given = {"view/back": "back", "expression/happy": "happy"}
    return [word for name, file in given.items() for word in ("--anchor", f"{name}={media / file}.png")]


@pytest.fixture(scope="module")
def whole(folder: Path, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The video of a run that nobody stopped, with a figure."""
    work = tmp_path_factory.mktemp("whole")
    figure = ["--attention-figure", str(work / "seen.png")]
    assert main(arguments(media, folder, work / "out.mp4", *anchored(media), *figure)) == 0
    return work


def test_a_folder_and_anchors_make_a_video_and_a_figure(whole: Path) -> None:
    assert read_video(whole / "out.mp4")[0].shape == (23, 64, 64, 3)
    assert {path.name for path in whole.iterdir()} == {"out.mp4", "seen.png", "seen.csv"}
    assert cv2.imread(str(whole / "seen.png")) is not None
    rows = (whole / "seen.csv").read_text().splitlines()
    assert rows[0] == "seconds,global,view/back,expression/happy"
    numbers = np.array([[float(cell) for cell in row.split(",")] for row in rows[1:]])
    assert len(numbers) == 7
    assert ((numbers[:, 1:] > 0) & (numbers[:, 1:] < 1)).all()


def killed_at_the_third_clip(words: list[str]) -> int:
    add = ClipStore.add

    def killed(self: ClipStore, *given: Any) -> None:
        if self.finished == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, *given)

    ClipStore.add = killed  # type: ignore[method-assign]
    return main(words)


def test_a_run_that_was_killed_goes_on_to_the_same_video(
    folder: Path, media: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = ["--attention-figure", str(tmp_path / "seen.png")]
    words = arguments(media, folder, tmp_path / "out.mp4", *anchored(media), *figure)
    assert run(killed_at_the_third_clip, words) == -signal.SIGKILL
    assert main(words) == 0
    assert "going on after 2 of 3 clips" in capsys.readouterr().err
    np.testing.assert_array_equal(read_video(tmp_path / "out.mp4")[0], read_video(whole / "out.mp4")[0])
    assert (tmp_path / "seen.csv").read_text() == (whole / "seen.csv").read_text()


def killed_before_the_video_has_its_name(words: list[str]) -> int:
    def killed(self: VideoSink) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    VideoSink.finish = killed  # type: ignore[method-assign]
    return main(words)


def test_a_figure_under_another_name_is_drawn_also_when_all_chunks_are_finished(
    folder: Path, media: Path, whole: Path, tmp_path: Path
) -> None:
    words = arguments(media, folder, tmp_path / "out.mp4", *anchored(media), "--attention-figure")
    assert run(killed_before_the_video_has_its_name, [*words, str(tmp_path / "seen.png")]) == -signal.SIGKILL
    assert main([*words, str(tmp_path / "other.png")]) == 0
    np.testing.assert_array_equal(read_video(tmp_path / "out.mp4")[0], read_video(whole / "out.mp4")[0])
    assert (tmp_path / "other.csv").read_bytes() == (whole / "seen.csv").read_bytes()
    assert (tmp_path / "other.png").read_bytes() == (whole / "seen.png").read_bytes()


def test_a_figure_that_another_run_makes_is_refused_and_a_full_disk_told(
    folder: Path, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture of one run would stand beside the numbers of another."""
    words = arguments(media, folder, tmp_path / "out.mp4", *anchored(media), "--attention-figure")
    with alone([tmp_path / "seen.csv"], "talkingdit generate"):
        assert main([*words, str(tmp_path / "seen.png")]) == 2
    assert f"{tmp_path / 'seen.csv'}: another run (talkingdit generate, process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(attention, "write_whole", full)
    assert main([*words, str(tmp_path / "seen.png")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"talkingdit: {tmp_path / 'seen.csv'}: cannot be written ({os.strerror(errno.ENOSPC)})."
    )
    assert {path.name for path in tmp_path.iterdir()} == {"out.mp4.parts"}


def test_other_anchors_are_another_video(folder: Path, media: Path, whole: Path, tmp_path: Path) -> None:
    assert main(arguments(media, folder, tmp_path / "out.mp4", "--frames", "13", "--no-global-anchor")) == 0
    video = read_video(tmp_path / "out.mp4")[0]
    assert (video.astype(int) - read_video(whole / "out.mp4")[0][:13] != 0).any()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) != 0
    return capsys.readouterr().err


def test_what_is_wrong_with_anchors_is_said(
    folder: Path, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(media, folder, tmp_path / "out.mp4")
    back = str(media / "back.png")
    said = refused([*words, "--anchor", f"view/top={back}"], capsys)
    assert "kind of view must be one of front, back, left, right, got 'top'" in said
    said = refused([*words, "--anchor", f"view/back={back}", "--anchor", f"view/back={back}"], capsys)
    assert f"anchor view/back: given twice, as {back} and {back}; take one." in said
    over = [*words, "--anchor", f"view/back={back}", "--attention-figure", back]
    assert f"attention_figure {back!r}: expected a file of its own, got the one given as anchor view/back" in refused(
        over, capsys
    )
    assert "nowhere.png" in refused([*words, "--anchor", "global=nowhere.png"], capsys)
    assert list(tmp_path.iterdir()) == []


def test_wan_i2v_refuses_a_voice_that_is_still_spoken_before_a_model_is_loaded(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not hear goes on from frames, and its video is as long as the sound."""
    from talkingdit.families.wan_i2v import checkpoint
    from talkingdit.pipelines import inputs

    folder = make_i2v(tmp_path / "i2v")

    monkeypatch.setattr(checkpoint, "load_checkpoint", None)
    words = arguments(media, folder, tmp_path / "out.mp4")
    words[words.index("--audio") + 1] = "-"
    with (media / "voice.wav").open("rb") as voice:
        monkeypatch.setattr(inputs, "STANDARD_INPUT", voice.fileno())
        said = refused(words, capsys)
    assert "audio -: expected a voice from a file, as this model must have all of it before" in said
    assert [path.name for path in tmp_path.iterdir()] == ["i2v"]


def test_wan_i2v_makes_a_video_as_long_as_the_sound(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_i2v(tmp_path / "i2v")
    assert main(arguments(media, folder, tmp_path / "out.mp4")) == 0
    assert "this model does not hear" in capsys.readouterr().err
    assert read_video(tmp_path / "out.mp4")[0].shape == (23, 64, 64, 3)
