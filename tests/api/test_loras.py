# SPDX-License-Identifier: Apache-2.0
"""LoRAs of a pipeline, as diffusers names what is done with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from api_world import World
from safetensors.torch import load_file

import talkingdit
from talkingdit.cli.main import main
from talkingdit.errors import UserError


def test_strengths_names_fusing_and_unloading(
    world: World, pipe: talkingdit.TalkingPipeline, whole: np.ndarray, written: list[np.ndarray], tmp_path: Path
) -> None:
    style = world.folder / "style.safetensors"
    files = ["--image", str(world.folder / "face.png"), "--audio", str(world.folder / "voice.wav")]
    more = ["--checkpoint", str(world.checkpoint), "--prompt", "a person", "--lora", f"{style}:0.1"]
    assert main(["generate", *files, "-o", str(tmp_path / "cli.mp4"), *more]) == 0
    command = np.concatenate(written)
    assert np.abs(command.astype(int) - whole).mean() > 1

    pipe.load_lora_weights(style, adapter_name="style")
    pipe.load_lora_weights(load_file(style))
    assert pipe.get_list_adapters() == {"transformer": ["style", "default_1"]}
    assert pipe.get_active_adapters() == ["style", "default_1"]
    pipe.set_adapters("style", 0.1)
    assert pipe.get_active_adapters() == ["style"]
    beside = pipe(**world.given).frames
    assert np.abs(beside.astype(int) - command).max() <= 3  # it rounds differently
    pipe.set_adapters(["style", "default_1"], [0.06, 0.04])
    assert np.abs(pipe(**world.given).frames.astype(int) - command).max() <= 3
    pipe.set_adapters(["style"], [0.2])
    pipe.fuse_lora(lora_scale=0.5)
    np.testing.assert_array_equal(pipe(**world.given).frames, command)
    pipe.unfuse_lora()
    pipe.disable_lora()
    np.testing.assert_array_equal(pipe(**world.given).frames, whole)
    pipe.set_adapters("style", 0.1)
    pipe.delete_adapters("default_1")
    np.testing.assert_array_equal(pipe(**world.given).frames, beside)
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}
    np.testing.assert_array_equal(pipe(**world.given).frames, whole)


def test_a_video_of_another_lora_is_not_gone_on_from(
    world: World, pipe: talkingdit.TalkingPipeline, tmp_path: Path
) -> None:
    def stop(given: talkingdit.TalkingPipeline, step: int, *_: object) -> None:
        steps.append(step)
        given._interrupt = len(steps) == 3

    steps: list[int] = []
    said: list[str] = []
    pipe(**world.given, output=tmp_path / "out.mp4", callback_on_step_end=stop)
    pipe.load_lora_weights(world.folder, weight_name="style.safetensors")
    pipe(**world.given, output=tmp_path / "out.mp4", warn=said.append)
    assert said == [f"{tmp_path / 'out.mp4.parts'} was made with another choice of LoRAs; starting over."]


def test_what_is_wrong_is_said_and_changes_nothing(
    world: World, pipe: talkingdit.TalkingPipeline, whole: np.ndarray, tmp_path: Path
) -> None:
    style = world.folder / "style.safetensors"
    with pytest.raises(UserError, match="fuse_lora: expected LoRAs that are active, got none"):
        pipe.fuse_lora()
    with pytest.raises(UserError, match="there is no such LoRA file"):
        pipe.load_lora_weights(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="'hotswap' is unknown here"):
        pipe.load_lora_weights(style, hotswap=True)
    np.testing.assert_array_equal(pipe(**world.given).frames, whole)
    pipe.load_lora_weights(style, "style")
    for call, sentence in (
        (lambda: pipe.load_lora_weights(style, "style"), "there is a LoRA 'style' already"),
        (lambda: pipe.load_lora_weights(style, "a.b"), "must not be empty or have a dot"),
        (lambda: pipe.set_adapters("stile"), "expected one of style, got 'stile'"),
        (lambda: pipe.set_adapters(["style"], [1, 2]), "expected 1 weights for 1 names, got 2"),
        (lambda: pipe.set_adapters("style", "much"), "expected 1 weights for 1 names, got 4"),
        (lambda: pipe.fuse_lora(["text_encoder"]), "expected the component 'transformer' alone"),
        (lambda: pipe.to(dtype=__import__("torch").bfloat16), "got changed ones"),
    ):
        with pytest.raises(UserError, match=sentence):
            call()
    assert pipe.get_active_adapters() == ["style"]


def test_what_is_no_lora_is_one_sentence(pipe: talkingdit.TalkingPipeline) -> None:
    sentence = r"^load_lora_weights: expected a file, a folder or tensors by name, got int\.$"
    with pytest.raises(UserError, match=sentence):
        pipe.load_lora_weights(3)  # type: ignore[arg-type]
