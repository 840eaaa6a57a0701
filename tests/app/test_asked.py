# SPDX-License-Identifier: Apache-2.0
"""From words and files to a job, and the form that asks for them: every option of every family, none typed again."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from talkingdit import families
from talkingdit.app.asked import VIDEO, Asked, Machine, loras_of, options_of, prepare
from talkingdit.app.form import collect, form_of, named, named_too, speaker_rows, speakers, width
from talkingdit.app.queue import model_of
from talkingdit.app.worker import Interrupt, Worker
from talkingdit.errors import UserError
from talkingdit.families.fields import fields
from talkingdit.families.lora_options import LoraOptions

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")
FAMILIES = families.names()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run, with a picture and two voices of 1 s."""
    Image.fromarray(np.full((48, 64, 3), 128, np.uint8)).save(tmp_path / "image.png")
    sound = 0.3 * np.sin(np.arange(16_000) * 0.05)
    for name in ("audio.wav", "voice-1.wav", "voice-2.wav"):
        soundfile.write(tmp_path / name, sound, 16_000)
    return tmp_path


def test_what_is_asked_for_becomes_a_job_of_the_shipped_model(folder: Path) -> None:
    asked = Asked(image="image.png", audio="audio.wav", options={"steps": "3", "sequential": True, "seed": "5"})
    prepared = prepare(asked, folder, Machine())
    assert (prepared.family.name, prepared.outline.steps, prepared.options.seed) == ("puppet", 3, 5)
    assert prepared.inputs.job.output == folder / "video.mp4"
    assert prepared.inputs.job.live


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": "many"}, "steps: invalid integer value: 'many'."),
        ({"steps": "0"}, "steps must be at least 1, got 0."),
        ({"sequential": "yes"}, "sequential: expected true or false, got 'yes'."),
        ({"steps": ["1"]}, "steps: expected one value, got ['1']."),
        ({"beauty": "9"}, "beauty: expected an option of"),
    ],
)
def test_a_wrong_option_is_one_sentence(folder: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(sentence)):
        options_of(families.get("puppet"), options, folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_an_option_takes_no_name_of_another_file(name: str, folder: Path) -> None:
    """A film to dub would lie where its video is to be written."""
    (folder / "uploads").mkdir()
    (folder / "run").mkdir()
    form, values = form_of(families.get(name)), []
    for one in form.fields:
        file = folder / "uploads" / f"{one.name}.mp4"
        file.touch()
        plain = ["", None] if one.flag.many else [one.default if one.switch else ""]
        values += [str(file)] if one.kind is Path else plain
    files = set(collect(form, values, folder / "run").values())
    assert not files & {VIDEO, "image.mp4", "audio.mp4"}
    assert files == {path.name for path in (folder / "run").iterdir()}


@pytest.mark.parametrize("path", ["../other/pose.mp4", "/etc/hostname", "sub/pose.mp4"])
def test_options_name_only_files_of_their_run(folder: Path, path: str) -> None:
    with pytest.raises(UserError, match="pose: expected one of the files that were uploaded"):
        options_of(families.get("wan_s2v"), {"pose": path}, folder)
    with pytest.raises(UserError, match="expected one of the files that were uploaded"):
        options_of(families.get("hunyuan_avatar"), {"speaker": [f"anna={path}@0,0,9,9"]}, folder)
    assert options_of(families.get("wan_s2v"), {"pose": "pose.mp4"}, folder).files() == {"pose": folder / "pose.mp4"}


def test_a_missing_picture_or_voice_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match="picture: expected one, got none"):
        prepare(Asked(audio="audio.wav"), folder, Machine())
    with pytest.raises(UserError, match="voice: expected a recording, got none"):
        prepare(Asked(image="image.png"), folder, Machine())


def test_a_device_that_is_not_there_is_told(folder: Path) -> None:
    worker = Worker(
        Machine(device="toaster"), lambda event: None, Interrupt.__new__(Interrupt)
    )  # hears no signals here
    with pytest.raises(UserError, match="the device 'toaster' cannot be used"):
        worker.load(Asked(image="image.png", audio="audio.wav"), folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_form_of_a_family_has_each_of_its_options_once(name: str) -> None:
    form = form_of(families.get(name))
    found = [one.name for one in form.fields] + [one.name for one in [form.speaker] if one is not None]
    assert sorted(found) == sorted(
        one.name for kind in (families.get(name).options, LoraOptions) for one in fields(kind)
    )
    assert [one.name for one in form.shown[:2]] == ["seed", "steps"]
    assert all(one.help for one in form.fields)
    assert (form.speaker is not None) == (name == "hunyuan_avatar")  # voices and boxes have rows of their own


@needs_gradio
@pytest.mark.parametrize("name", FAMILIES)
def test_an_untouched_form_asks_for_nothing(name: str, tmp_path: Path) -> None:
    """And what it says as defaults are those of the options."""
    import gradio as gr

    from talkingdit.app.form import components

    form = form_of(families.get(name))
    with gr.Blocks(analytics_enabled=False):
        made = [components(one, None) for one in form.fields]
    assert [len(parts) for parts in made] == [width(one) for one in form.fields]
    values = [part.value for parts in made for part in parts]
    assert collect(form, values, tmp_path) == {}


@needs_gradio
def test_what_was_typed_fills_the_form_again(folder: Path) -> None:
    """Options -> form -> options."""
    import gradio as gr

    from talkingdit.app.form import components

    family = families.get("hunyuan_avatar")
    form = form_of(family)
    texts = {"steps": "4", "size": "64x32", "guidance": "3.5", "sequential": True, "emotion": ["happy.png@0-1"]}
    with gr.Blocks(analytics_enabled=False):
        values = [part.value for one in form.fields for part in components(one, texts.get(one.name))]
    assert collect(form, values, folder) == texts


def test_speakers_of_the_form_are_those_of_the_command_line(folder: Path) -> None:
    first, second = str(folder / "voice-1.wav"), str(folder / "voice-2.wav")
    rows = [["Anna", first, "0, 0, 30, 40"], ["Ben B.", second, ""], ["", None, ""]]
    inside = folder / "run"
    inside.mkdir()
    words = speakers(rows, inside)
    assert words == ["Anna=voice-1.wav@0,0,30,40", "Ben B.=voice-2.wav"]
    options = options_of(families.get("hunyuan_avatar"), {"speaker": words}, inside)
    assert options.voices() == (inside / "voice-1.wav", inside / "voice-2.wav")
    assert options.speaker[0].box == (0, 0, 30, 40)
    assert speaker_rows(words)[:2] == [("Anna", "0,0,30,40"), ("Ben B.", "")]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (["", "voice-1.wav", ""], "speaker 1: expected a name of letters"),
        (["a=/etc/passwd", None, ""], "speaker 1: expected a name of letters"),
        (["Anna", None, "1,2"], "speaker 1: expected a box of four numbers, left, top, right, bottom, got '1,2'"),
    ],
)
def test_a_wrong_speaker_is_one_sentence(folder: Path, row: list[Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        speakers([row], folder)


def test_loras_are_uploads_with_a_strength(folder: Path) -> None:
    """From the form, where a file names itself, to the model: other files or strengths, another worker."""
    assert named_too("", ["/tmp/a/style.safetensors"]) == "style.safetensors"
    assert named_too("style.safetensors:0.5", ["/x/style.safetensors", "/x/b.pt"]) == "style.safetensors:0.5\nb.pt"
    uploads, runs = folder / "uploads", [folder / "one", folder / "two"]
    for made in (uploads, *runs):
        made.mkdir()
    (uploads / "style.safetensors").write_bytes(b"weights")
    form, asked = form_of(families.get("puppet")), []
    empty = [("", None) if one.flag.many else (one.default,) for one in form.fields]
    for run, strength in zip(runs, ("0.5", "0.7"), strict=True):
        said = {"lora": (f"style.safetensors:{strength}", [str(uploads / "style.safetensors")])}
        values = [value for one, plain in zip(form.fields, empty, strict=True) for value in said.get(one.name, plain)]
        asked.append(Asked(options=collect(form, values, run)))
        (choice,) = loras_of(asked[-1].options, run).lora
        assert (choice.path, choice.strength) == (run / "lora-1.safetensors", float(strength))
    assert model_of(asked[0], runs[0]) == model_of(asked[0], runs[1]) != model_of(asked[1], runs[1])
    assert model_of(asked[0], runs[0]) != model_of(Asked(), folder)
    for foreign in ("/etc/hostname", "../two/lora-1.safetensors:0.5", "other.safetensors"):
        with pytest.raises(UserError, match="lora: expected one of the files that were uploaded"):
            loras_of({"lora": [foreign]}, runs[0])
    with pytest.raises(UserError, match="lora: must be FILE or FILE:STRENGTH, got ':2'"):
        loras_of({"lora": [":2"]}, runs[0])


def test_words_name_uploaded_files_by_the_names_that_they_had() -> None:
    files = {"back view.png": "anchor-1.png", "view.png": "anchor-2.png"}
    assert named(["view/back=back view.png", "global=view.png"], files) == [
        "view/back=anchor-1.png",
        "global=anchor-2.png",
    ]


@needs_gradio
def test_the_picture_shows_boxes(folder: Path) -> None:
    from talkingdit.app.boxes import drawn_boxes

    drawing = drawn_boxes(str(folder / "image.png"), ["", "Ben <b>", ""], ["", "10,5,40,30", "9,9,1,1"])
    assert 'viewBox="0 0 64 48"' in drawing
    assert '<rect x="10" y="5" width="30" height="25"' in drawing
    assert "Ben &lt;b&gt; at 10, 5, 40, 30" in drawing  # for those who do not see it
    assert drawing.count("<rect") == 1
