# SPDX-License-Identifier: Apache-2.0
"""Callbacks after denoising steps, as in diffusers: what they see, what they replace, how they stop the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_world import World
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback

import talkingdit
from talkingdit.errors import UserError


def short(world: World) -> dict[str, Any]:
    """Arguments for a video of one clip."""
    return world.given | {"audio": (world.voice[:8000], 16000)}


def test_steps_and_timesteps_are_those_of_the_scheduler(world: World, pipe: talkingdit.TalkingPipeline) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def callback(given: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert given is pipe
        seen.append((step, float(timestep), tuple(tensors["latents"].shape)))
        return {}

    pipe(**world.given, steps=2, callback_on_step_end=callback)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert [step for step, *_ in seen] == [0, 1] * 3
    np.testing.assert_allclose([time for _, time, _ in seen], scheduler.timesteps.tolist() * 3, rtol=1e-6)
    assert {shape for *_, shape in seen} == {(1, 16, 2, 4, 4)}


def test_replaced_latents_are_gone_on_from(world: World, pipe: talkingdit.TalkingPipeline) -> None:
    """The latents of another seed's last step in the place of ours: its video."""
    given, last = short(world), []

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last[:] = [tensors["latents"].clone()]
        return tensors

    def put(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": last[0]} if step == 1 else tensors

    other = pipe(**given, seed=1, callback_on_step_end=keep).frames
    ours = pipe(**given, callback_on_step_end=put).frames
    np.testing.assert_array_equal(ours, other)
    assert (other != pipe(**given).frames).any()


class Halved(PipelineCallback):
    """One of diffusers' own kind."""

    tensor_inputs = ["latents"]  # noqa: RUF012

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Any) -> Any:
        callback_kwargs["latents"] = callback_kwargs["latents"] / 2
        return callback_kwargs


def test_callbacks_of_diffusers_work(world: World, pipe: talkingdit.TalkingPipeline) -> None:
    halved = pipe(**short(world), callback_on_step_end=Halved(cutoff_step_ratio=None, cutoff_step_index=0)).frames
    by_hand = pipe(**short(world), callback_on_step_end=lambda *given: {"latents": given[3]["latents"] / 2}).frames
    np.testing.assert_array_equal(halved, by_hand)
    assert (halved != pipe(**short(world)).frames).any()


def test_an_interruption_keeps_finished_clips_and_the_same_call_goes_on(
    world: World, pipe: talkingdit.TalkingPipeline, whole: np.ndarray, written: list[np.ndarray], tmp_path: Path
) -> None:
    def stop(given: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        given._interrupt = len(steps) == 5  # the first step of the third clip
        return tensors

    steps: list[int] = []
    said: list[str] = []
    target = tmp_path / "out.mp4"
    out = pipe(**world.given, output=target, callback_on_step_end=stop, warn=said.append)
    assert out.interrupted
    assert out.path is None
    assert said == [f"interrupted; 2 of 3 clips are kept in {target}.parts."]
    np.testing.assert_array_equal(out.frames, whole[:16])
    assert len(steps) == 5
    assert not target.exists()
    steps.clear()
    written.clear()
    again = pipe(**world.given, output=target, callback_on_step_end=lambda *given: steps.append(given[1]))
    assert steps == [0, 1]
    assert again.path == target
    np.testing.assert_array_equal(np.concatenate(written), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_without_a_file_the_finished_clips_come_back(
    world: World, pipe: talkingdit.TalkingPipeline, whole: np.ndarray, tmp_path: Path
) -> None:
    def stop(given: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        if step == 1:
            given.interrupt()

    out = pipe(**world.given, callback_on_step_end=lambda *given: given[0].interrupt())
    assert out.interrupted
    assert out.frames.shape == (0, 32, 32, 3)
    with pytest.raises(UserError, match="stopped before its first clip"):
        out.sheet(tmp_path / "out.png")
    steps: list[int] = []

    def after_one_clip(given: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        steps.append(step)
        if len(steps) == 3:
            given.interrupt()

    out = pipe(**world.given, callback_on_step_end=after_one_clip)
    np.testing.assert_array_equal(out.frames, whole[:8])
    out.save(tmp_path / "out.mp4")
    np.testing.assert_array_equal(pipe(**world.given).frames, whole)  # the next call is not stopped


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"expected a list of some of latents, got \['noise'\]"),
        (
            {"callback_on_step_end": lambda *_: {"latents": torch.zeros(1, 2)}},
            r"expected latents of shape \[1, 16, 2, 4, 4\] after step 0, got shape \[1, 2\]",
        ),
        ({"callback_on_step_end": lambda *_: {"latents": 3}}, "after step 0, got int"),
    ],
)
def test_what_does_not_fit_is_said(
    world: World, pipe: talkingdit.TalkingPipeline, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        pipe(**world.given, **given)
