# SPDX-License-Identifier: Apache-2.0
"""The nodes for ComfyUI make the videos that a pipeline makes, tell how far they are, stop, and run again only when
something has changed."""

from __future__ import annotations

import copy
import inspect
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from contract import InterruptProcessingException

import talkingdit
from talkingdit.errors import UserError
from talkingdit.media.image import read_image
from talkingdit.models import default_checkpoint

GENERATE = {
    "load": {"class_type": "TalkingDiTLoad", "inputs": {"checkpoint": "shipped: drawn characters"}},
    "image": {"class_type": "LoadImage", "inputs": {"image": "portrait.png"}},
    "voice": {"class_type": "LoadAudio", "inputs": {"audio": "voice.wav"}},
    "options": {
        "class_type": "TalkingDiTOptions_puppet",
        "inputs": {"text_guidance": 2.0, "audio_guidance": -1, "generated_clothes": True},
    },
    "generate": {
        "class_type": "TalkingDiTGenerate",
        "inputs": {
            "model": ["load", 0],
            "image": ["image", 0],
            "audio": ["voice", 0],
            "options": ["options", 0],
            "prompt": "a person talking, happy",
            "seed": 3,
            "steps": 2,
        },
    },
    "save": {
        "class_type": "SaveVideo",
        "inputs": {"video": ["generate", 3], "filename_prefix": "talk", "format": "auto", "codec": "auto"},
    },
}


@pytest.fixture(scope="module")
def outputs(comfy):
    comfy.progress.clear()
    found = comfy.run(GENERATE)
    return found["generate"], list(comfy.progress), list(comfy.executed)


@pytest.fixture(scope="module")
def expected(comfy):
    pipe = talkingdit.TalkingPipeline.from_pretrained()
    samples, rate = soundfile.read(comfy.input / "voice.wav", dtype="float32")
    options = dict(text_guidance=2.0, generated_clothes=True, seed=3, steps=2)
    image = read_image(comfy.input / "portrait.png")
    return pipe(image=image, audio=(samples, rate), prompt="a person talking, happy", **options)


def test_every_node_keeps_the_contract(comfy):
    pack = {name: kind for name, kind in comfy.nodes.items() if name.startswith("TalkingDiT")}
    assert len(pack) == 9 + len(talkingdit.families.names())
    for name, kind in pack.items():
        inputs = kind.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional"}
        assert len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES) > 0
        assert kind.CATEGORY.startswith("talkingdit")
        assert kind.DESCRIPTION
        takes = inspect.signature(getattr(kind, kind.FUNCTION)).parameters
        every = any(one.kind is one.VAR_KEYWORD for one in takes.values())
        for word, (type_, *about) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
            assert every or word in takes, f"{name}: {word}"
            assert isinstance(type_, str | list)
            if isinstance(type_, list) and about and "default" in about[0]:
                assert about[0]["default"] in type_
        for word in inputs.get("optional", {}):
            assert every or takes[word].default is not inspect.Parameter.empty, f"{name}: {word}"


def test_a_video_is_that_of_a_pipeline(outputs, expected):
    (images, audio, fps, video, result), *_ = outputs
    assert images.dtype == torch.float32
    assert torch.equal((images * 255).round().byte(), torch.from_numpy(expected.frames.copy()))
    assert fps == float(expected.fps)
    samples, rate = expected.audio
    assert audio["sample_rate"] == rate == 24000
    assert torch.equal(audio["waveform"], torch.from_numpy(samples.T.copy())[None])
    assert np.array_equal(result.frames, expected.frames)
    # As a file it is what `talkingdit generate` writes.
    assert abs(video.get_components().images - images).mean() < 0.02
    assert video.get_components().frame_rate == expected.fps


def test_progress_goes_up_to_its_end(outputs):
    _, progress, executed = outputs
    done = [value for value, _ in progress]
    assert done == sorted(done)
    assert done[-1] == progress[-1][1] >= 2
    assert set(executed) == set(GENERATE)


def test_the_file_that_is_saved_plays(comfy, outputs):
    assert (comfy.output / "talk.mp4").stat().st_size > 1000


def changed(**words):
    prompt = copy.deepcopy(GENERATE)
    for word, value in words.items():
        prompt["generate"]["inputs"][word] = value
    return prompt


def test_only_what_has_changed_runs_again(comfy, outputs):
    comfy.run(GENERATE)
    assert comfy.executed == []
    comfy.run(changed(seed=4))
    assert comfy.executed == ["generate", "save"]
    comfy.run(changed(seed=4))
    assert comfy.executed == []


def test_a_changed_checkpoint_is_another_one(comfy):
    folder = comfy.root / "models" / "talkingdit" / "drawn" / "mine"
    shutil.copytree(default_checkpoint(), folder)
    prompt = changed(steps=1)
    prompt["load"]["inputs"]["checkpoint"] = "drawn/mine"
    comfy.run(prompt)
    assert "generate" in comfy.executed
    comfy.run(prompt)
    assert comfy.executed == []
    file = next(path for path in folder.rglob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    comfy.run(prompt)
    assert comfy.executed == ["load", "generate", "save"]


def test_cancel_stops_the_work_and_leaves_nothing(comfy, outputs):
    before = sorted(comfy.temp.iterdir())
    comfy.on_progress = lambda done, total: comfy.interrupt()
    try:
        with pytest.raises(InterruptProcessingException):
            comfy.run(changed(seed=5))
    finally:
        comfy.on_progress = None
    assert sorted(comfy.temp.iterdir()) == before
    comfy.run(changed(seed=5))
    assert "generate" in comfy.executed


def test_a_sheet_is_a_picture(comfy, outputs):
    prompt = {**GENERATE, "sheet": {"class_type": "TalkingDiTSheet", "inputs": {"result": ["generate", 4]}}}
    (image,) = comfy.run(prompt)["sheet"]
    assert image.dim() == 4
    assert image.shape[0] == 1
    assert image.shape[3] == 3
    assert image.std() > 0.05
    assert not list(comfy.temp.glob("*.png"))


def test_a_path_in_place_of_a_name(comfy, tmp_path):
    prompt = copy.deepcopy(GENERATE)
    prompt["load"]["inputs"]["path"] = str(tmp_path)
    with pytest.raises(UserError, match="expected the checkpoint of one of"):
        comfy.run(prompt)
    prompt["load"]["inputs"]["path"] = str(default_checkpoint())
    loaded = comfy.run({"load": prompt["load"]})["load"][0]
    assert loaded.slot.recipe.folder == Path(default_checkpoint())


def test_options_of_another_family(comfy):
    prompt = copy.deepcopy(GENERATE)
    prompt["options"] = {"class_type": "TalkingDiTOptions_wan_s2v", "inputs": {}}
    with pytest.raises(UserError, match=r"options: expected those of .* got those of Wan"):
        comfy.run(prompt)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"memory": "offload=nothing"}, "--memory"),
        ({"precision": "fp8", "memory": "precision=int8"}, "precision must be"),
    ],
)
def test_wrong_words_of_the_loader_are_told_by_it(comfy, words, sentence):
    load = {"class_type": "TalkingDiTLoad", "inputs": {"checkpoint": "shipped: drawn characters", **words}}
    with pytest.raises(UserError, match=sentence):
        comfy.run({"load": load})
