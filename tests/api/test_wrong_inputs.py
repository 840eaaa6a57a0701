# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a call is one sentence: what, where, expected, got; said before any model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_world import World

import talkingdit
from talkingdit import families, models
from talkingdit.api.materials import Materials
from talkingdit.api.options import chosen
from talkingdit.errors import UserError

BOX = (1, 2, 30, 40)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"image": None}, "image: expected a path, a PIL image or a uint8 array [H, W, 3], got none."),
        ({"image": 3}, "image: expected a path, a PIL image or a uint8 array [H, W, 3], got int."),
        ({"image": np.zeros((4, 4, 3))}, "got float64 of shape [4, 4, 3]."),
        ({"image": np.zeros((3, 4, 4), np.uint8)}, "got uint8 of shape [3, 4, 4]."),
        ({"image": "nobody.png"}, "image 'nobody.png': expected an existing file"),
        ({"audio": None}, "audio: expected a path or (samples, rate), got none."),
        ({"audio": np.zeros(9)}, "audio: expected a path or (samples, rate) with float32 samples [n] or [n, channels]"),
        ({"audio": (np.zeros(9, np.int64), 16000)}, "got samples of int64 and shape [9]."),
        ({"audio": (np.zeros((2, 16000)), 16000)}, "got samples of float64 and shape [2, 16000]."),
        ({"audio": (np.zeros(9), 16000.5)}, "got the rate 16000.5."),
        ({"audio": (np.zeros(16000), 16000)}, "silen"),
        ({"audio": (np.full(16000, np.nan), 16000)}, "expected finite samples, got NaN or infinity"),
        ({"prompt": 3}, "prompt: expected words, got int."),
        ({"num_inference_steps": 3}, "has no option 'num_inference_steps'; here it is steps."),
        ({"generator": torch.Generator()}, "has no option 'generator'; here it is seed."),
        ({"text_guidence": 3.0}, "has no option 'text_guidence'; near ones are text_guidance"),
        ({"emotion_strength": 1.0}, "has no option 'emotion_strength', only HunyuanVideo-Avatar."),
        ({"xyz": 1}, "has no option 'xyz'; there are audio_guidance, "),
        ({"steps": 0}, "steps must be at least 1, got 0."),
        ({"steps": "many"}, "generate: steps must be a whole number, got 'many'."),
        ({"steps": True}, "generate: steps must be a whole number, got True."),
        ({"text_guidance": "strong"}, "generate: text_guidance must be a number, got 'strong'."),
        ({"sequential": 1}, "generate: sequential must be True or False, got 1."),
        ({"seed": -1}, "seed must be at least 0, got -1."),
        ({"upscale": 2}, "sheet, upscale, live and resume go with an output"),
        ({"output": "out.avi"}, "expected a name that ends in .mp4, got '.avi'"),
        ({"output": 3}, "output: expected a path, got int."),
        ({"output": "out.mp4", "sheet": 3}, "sheet: expected a path, got int."),
        ({"output": "out.mp4", "upscale": "2"}, "upscale: expected a whole number, got '2'."),
        ({"audio_rate": "x"}, "audio_rate: expected a whole number, got 'x'."),
        ({"progress": 3}, "progress: expected a function, got int."),
        ({"warn": 3}, "warn: expected a function, got int."),
        ({"callback_on_step_end": 3}, "callback_on_step_end: expected a function, got int."),
        ({"callback_on_step_end": lambda *_: 3}, "expected a dictionary of tensors after step 0, got int."),
    ],
)
def test_one_sentence(world: World, pipe: talkingdit.TalkingPipeline, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        pipe(**world.given | given)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = talkingdit.TalkingPipeline.from_pretrained
    with pytest.raises(
        UserError, match="expected a folder, or a name on the Hugging Face hub, owner/name; got neither"
    ):
        load(tmp_path / "nobody")
    with pytest.raises(UserError, match="'revision' is unknown, or has no effect with the model that ships"):
        load(revision="main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"^nobody/nothing: neither a folder here nor a checkpoint that the .* hub gives"
    ):
        load("nobody/nothing", cache_dir=tmp_path)
    with pytest.raises(UserError, match="memory"):
        load(memory="weights=none")
    with pytest.raises(UserError, match=r"^from_pretrained: expected a folder or a name, got int\.$"):
        load(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_one_sentence_and_moves_nothing(
    world: World, pipe: talkingdit.TalkingPipeline, tmp_path: Path, device: str
) -> None:
    """It was said to be a damaged file, to be downloaded again, or came as torch's own error."""
    asked = dict(checkpoint=world.checkpoint, device=device)
    for attempt in (
        lambda: talkingdit.TalkingPipeline.from_pretrained(world.checkpoint, device=device),
        lambda: models.load_checkpoint(world.checkpoint, device=device),
        lambda: models.load(world.checkpoint, device=device),
        lambda: talkingdit.generate(world.face, world.given["audio"], tmp_path / "out.mp4", **asked),
        lambda: pipe.to(device),
        lambda: pipe.to(device, torch.bfloat16),
        lambda: pipe.enable_model_cpu_offload(device=device),
        lambda: pipe.enable_sequential_cpu_offload(device=device),
        lambda: pipe.enable_group_offload(device),
        lambda: pipe.enable_group_offload("cpu", device),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        assert "device" in str(caught.value)
        assert "damaged" not in str(caught.value)
        assert "\n" not in str(caught.value)
    pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.int8])
def test_a_dtype_that_weights_cannot_have_is_one_sentence(
    world: World, pipe: talkingdit.TalkingPipeline, tmp_path: Path, dtype: Any
) -> None:
    for attempt in (
        lambda: talkingdit.TalkingPipeline.from_pretrained(world.checkpoint, torch_dtype=dtype),
        lambda: models.load_checkpoint(world.checkpoint, dtype),
        lambda: models.load(world.checkpoint, dtype),
        lambda: pipe.to(dtype=dtype),
    ):
        with pytest.raises(UserError, match=r"expected a .*floating-point dtype of torch"):
            attempt()


def test_a_name_on_the_hub_is_fetched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **more: asked.append((name, more)) or str(world.checkpoint)
    )
    assert talkingdit.TalkingPipeline.from_pretrained("a/b", revision="c").folder == world.checkpoint
    assert asked == [("a/b", {"revision": "c"})]


def test_options_that_change_a_loaded_model_are_refused(world: World) -> None:
    family, materials = families.get("wan_s2v"), Materials()
    assert chosen(family, {"memory": "vae=tiled"}, materials).memory == "vae=tiled"  # type: ignore[attr-defined]
    from talkingdit.api.asking import refuse_loading

    with pytest.raises(UserError, match="change a model while it is loaded"):
        refuse_loading(chosen(family, {"memory": "vae=tiled"}, materials))
    refuse_loading(chosen(family, {}, materials))


def test_options_take_what_a_program_holds(world: World) -> None:
    """Speakers, emotions, anchors, a video to dub: words, dictionaries, pictures and samples come to the same."""
    materials, picture, voice = Materials(), world.face, (world.voice, 16000)

    def made(family: str, **given: Any) -> Any:
        return chosen(families.get(family), given, materials)

    (anna, ben) = made(
        "hunyuan_avatar", speakers=[{"name": "anna", "voice": voice, "box": BOX}, "ben=ben.wav@1,2,30,40"]
    ).speaker
    assert (anna.name, anna.box, ben.name, ben.voice, ben.box) == ("anna", BOX, "ben", Path("ben.wav"), BOX)
    assert anna.voice.suffix == ".wav"
    assert anna.voice.exists()
    assert [s.name for s in made("hunyuan_avatar", speaker={"a": "a.wav", "b": voice}).speaker] == ["a", "b"]
    (emotion,) = made("hunyuan_avatar", emotion={"picture": picture, "start": 0.5, "end": 2.0}).emotion
    assert (emotion.start, emotion.end, emotion.picture.exists()) == (0.5, 2.0, True)
    assert made("hunyuan_avatar", emotions=picture).emotion[0].picture.exists()
    anchors = made("gloria", anchors={"view/back": picture, "expression/happy": "happy.png"}).anchor
    assert [(a.type, a.kind) for a in anchors] == [("view", "back"), ("expression", "happy")]
    assert made("skyreels_audio", video="in.mp4", guidance=3.5, size="96x64").video == Path("in.mp4")
    assert made("skyreels_audio", guidance=3.5).guidance == "3.5"
    assert made("skyreels_audio", size="96x64").size == (64, 96)
    for family, given, sentence in (
        ("gloria", {"anchors": {"view/above": picture}}, "kind of view must be one of"),
        ("gloria", {"anchor": [3]}, "anchor 1: expected a path, a PIL image or a uint8 array"),
        ("hunyuan_avatar", {"speakers": [{"nome": "anna"}]}, "speaker must have the fields name, voice"),
        ("hunyuan_avatar", {"speaker": "a=a.wav", "speakers": "b=b.wav"}, "was given twice"),
        ("hunyuan_avatar", {"speakers": [{"name": "a", "box": (3, 3, 1, 1)}]}, "must have a box"),
        ("skyreels_audio", {"size": "wide"}, "size must be WIDTHxHEIGHT"),
    ):
        with pytest.raises(UserError, match=sentence):
            made(family, **given)


def test_nothing_is_left_of_a_refused_call(world: World, pipe: talkingdit.TalkingPipeline, scratch: Path) -> None:
    with pytest.raises(UserError, match="silen"):
        pipe(world.face, (np.zeros(16000), 16000))
    assert not any(scratch.iterdir())
