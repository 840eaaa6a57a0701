# SPDX-License-Identifier: Apache-2.0
"""Offloading moves models and changes no frame. Without an accelerator the device is the host: every hook runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from api_world import World

import talkingdit
from talkingdit.errors import UserError

CALLS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "blocks": lambda pipe: pipe.enable_group_offload("cpu"),
    "leaves": lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    "all but": lambda pipe: pipe.enable_group_offload("cpu", exclude_modules=["transformer"]),
}


@pytest.mark.parametrize("how", CALLS)
def test_frames_stay_the_same(world: World, pipe: talkingdit.TalkingPipeline, whole: np.ndarray, how: str) -> None:
    CALLS[how](pipe)
    np.testing.assert_array_equal(pipe(**world.given).frames, whole)
    with pytest.raises(UserError, match="that nothing moves, got some that enable_"):
        pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(UserError, match="expected models that nothing moves"):
        pipe.to("cpu")


def test_large_models_take_turns(
    world: World, pipe: talkingdit.TalkingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    moves: list[str] = []
    for name in ("transformer", "text_encoder"):
        part, move = pipe.components[name], pipe.components[name].to

        def moved(*args: Any, name: str = name, move: Any = move) -> Any:
            moves.append(f"{name} {args[0]}")
            return move(*args)

        monkeypatch.setattr(part, "to", moved)
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: (moves.append("step"), forward(*a, **k))[1])
    next(pipe.stream(**world.given, steps=1))
    turn = ["transformer cpu", "text_encoder cpu", "text_encoder cpu", "transformer cpu"]
    assert moves == [*turn, "step"]


def test_tiles_are_another_video_for_those_who_go_on(pipe: talkingdit.TalkingPipeline) -> None:
    pipe.enable_vae_tiling()
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling
    assert pipe._variant == "tiled"
    pipe.disable_vae_tiling()
    assert not pipe.vae.use_tiling
    assert pipe._variant == ""
    pipe.enable_vae_slicing()
    pipe.disable_vae_slicing()


def test_what_cannot_be_is_said(pipe: talkingdit.TalkingPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match="enable_model_cpu_offload: expected an accelerator or a device, got neither"):
        pipe.enable_model_cpu_offload()
    with pytest.raises(UserError, match="there is no component 'unet'"):
        pipe.enable_group_offload("cpu", exclude_modules="unet")
    with pytest.raises(UserError, match=r"expected one number of a device, got 1 and cpu:0"):
        pipe.enable_sequential_cpu_offload(1, "cpu:0")
    monkeypatch.setattr(type(pipe.vae), "enable_tiling", None)
    with pytest.raises(UserError, match="enable_tiling: AutoencoderKLWan has no tiles"):
        pipe.enable_vae_tiling()
    pipe.enable_sequential_cpu_offload(device="cpu")  # a refusal before changes nothing
