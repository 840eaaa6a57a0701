# SPDX-License-Identifier: Apache-2.0
"""Guidance in an interval of the steps, of Wan I2V and of Gloria: outside only the conditioned prediction is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
import torch
from tiny_i2v import make_i2v
from torch import Tensor

from talkingdit import families, models
from talkingdit.distributed.layout import Layout, Parallel
from talkingdit.distributed.team import Team
from talkingdit.pipelines.guidance import Branch
from talkingdit.pipelines.inputs import Inputs, Job
from talkingdit.pipelines.parallel import share_work
from talkingdit.pipelines.solvers import flow_solver
from talkingdit.pipelines.step_cache import FILE, Fitted, write_fitted

STEPS, INTERVAL, INSIDE = 5, "0.2-0.6", (1, 2)
IMAGE = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
STRENGTHS = {"wan_i2v": {"guidance": 3.0}, "gloria": {"guidance": 2.0, "audio_guidance": 3.0}}
# Weights, and whether words and voice are given.
PREDICTIONS = {
    "wan_i2v": [(3.0, True, True), (-2.0, False, False)],
    "gloria": [(3.0, True, True), (-1.0, True, False), (-1.0, False, False)],
}
NONE = {"wan_i2v": {"guidance": 1.0}, "gloria": {"guidance": 1.0, "audio_guidance": 1.0}}


@pytest.fixture(scope="module", params=STRENGTHS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(name)
    if name == "wan_i2v":
        return make_i2v(folder / "model")
    tiny_families.gloria(folder)
    return folder / "model"


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Any:
    return models.load_checkpoint(folder)


def outlined(checkpoint: Any, name: str, **options: Any) -> tuple[Inputs, Any]:
    family = families.get(name)
    job = Job(image=Path("a.png"), audio=Path("a.wav"), output=Path("out.mp4"), prompt="a woman")
    inputs = Inputs(job, IMAGE, np.sin(np.arange(12800) * 0.08).astype(np.float32))
    return inputs, family.outline.outline(inputs, checkpoint.settings, family.options(steps=STEPS, **options))


def video(checkpoint: Any, name: str, parallel: Parallel | None = None, **options: Any) -> tuple[Any, Any]:
    pipeline = families.get(name).pipeline.open_pipeline(checkpoint, parallel)
    return pipeline, pipeline.encode(*outlined(checkpoint, name, **options))


def trajectory(
    checkpoint: Any,
    name: str,
    parallel: Parallel | None = None,
    graft: list[Tensor] | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[int], list[int]]:
    """Latents of the first clip after every step, and the samples of forward passes and of those that ran the blocks.

    Args:
        graft: latents that take the place of those of every step, before the next.
    """
    pipeline, conditions = video(checkpoint, name, parallel, **options)
    found, asked, computed = list[Tensor](), list[int](), list[int]()

    def progress(step: int, timestep: Tensor, x: Tensor) -> Tensor:
        found.append(x.clone())
        return x if graft is None else graft[step].clone()

    model = checkpoint.transformer
    hooks = [
        model.register_forward_hook(lambda _, given, out: asked.append(len(given[0]))),
        model.blocks[0].register_forward_hook(lambda _, given, out: computed.append(len(given[0]))),
    ]
    pipeline.clip(conditions, 0, last=True, progress=progress)
    for hook in hooks:
        hook.remove()
    return found, asked, computed


@torch.no_grad()
def told(checkpoint: Any, name: str, solver_name: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The same loop, told plainly."""
    pipeline, conditions = video(checkpoint, name, solver=solver_name)
    model, sampling = checkpoint.transformer, conditions.sampling
    clips: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "denoise", lambda _, clip, frames, progress: (clips.append(clip), x)[1])
        shape = (16, sampling.chunk_latents, *conditions.first.shape[-2:])
        x = pipeline.noise(shape, sampling.seed)
        pipeline.clip(conditions, 0, last=True)
    (clip,) = clips
    solver = flow_solver(solver_name, STEPS, sampling.shift)
    for step, time in enumerate(solver.timesteps):
        times = time.float().expand(1, shape[1]).clone()
        if clip.held is not None:
            x[:, :, :1], times[:, :1] = clip.held, 0
        velocity = torch.zeros_like(x)
        for weight, words, heard in PREDICTIONS[name] if step in INSIDE else [(1.0, True, True)]:
            given = pipeline.inputs(conditions, clip, (Branch(text=words, audio=heard, weight=1.0),))
            velocity += weight * model(x, times if clip.held is not None else times[:, 0], given)
        x = solver.step(velocity, time, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_only_steps_inside_are_guided(checkpoint: Any, name: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, count = told(checkpoint, name, solver, monkeypatch), len(PREDICTIONS[name])
    for sequential, samples in ((False, [1, count, count, 1, 1]), (True, [1] * (3 + 2 * count))):
        how = {"solver": solver, "guidance_interval": INTERVAL, "sequential": sequential} | STRENGTHS[name]
        made, asked, _ = trajectory(checkpoint, name, **how)
        assert asked == samples
        torch.testing.assert_close(made[-1], wanted, rtol=1e-3, atol=1e-3)


def test_a_step_is_what_it_is_with_guidance_or_without_it_to_the_bit(checkpoint: Any, name: str) -> None:
    """Each from the same latents, by Euler's solver, which remembers nothing."""
    inside, _, _ = trajectory(checkpoint, name, solver="euler", guidance_interval=INTERVAL, **STRENGTHS[name])
    guided, _, _ = trajectory(checkpoint, name, graft=inside, solver="euler", **STRENGTHS[name])
    without, _, _ = trajectory(checkpoint, name, graft=inside, solver="euler", **NONE[name])
    for step in range(STEPS):
        assert torch.equal(inside[step], guided[step]) == (step in INSIDE)
        assert torch.equal(inside[step], without[step]) == (step not in INSIDE)


def test_all_steps_and_none_of_them(checkpoint: Any, name: str) -> None:
    whole, asked, _ = trajectory(checkpoint, name, **STRENGTHS[name])
    assert asked == [len(PREDICTIONS[name])] * STEPS
    said, _, _ = trajectory(checkpoint, name, guidance_interval="0-1", **STRENGTHS[name])
    first, _, _ = trajectory(checkpoint, name, guidance_interval="0-0.4", **STRENGTHS[name])
    assert [torch.equal(a, b) for a, b in zip(whole, said, strict=True)] == [True] * STEPS
    assert [torch.equal(a, b) for a, b in zip(whole, first, strict=True)] == [True] * 2 + [False] * 3
    none, asked, _ = trajectory(checkpoint, name, guidance_interval="0.5-0.5", **STRENGTHS[name])
    assert asked == [1] * STEPS
    assert torch.equal(none[-1], trajectory(checkpoint, name, **NONE[name])[0][-1])


def test_no_prediction_goes_on_from_what_another_left(checkpoint: Any, name: str, tmp_path: Path) -> None:
    """A step cache begins anew where the interval begins and ends, steps 1 and 3, and skips step 2."""
    write_fitted(tmp_path / FILE, Fitted((1.0, 0.0)))
    cached, count = dataclasses.replace(checkpoint, folder=tmp_path), len(PREDICTIONS[name])
    how = {"guidance_interval": INTERVAL, "step_cache": 1e9} | STRENGTHS[name]
    batched, _, computed = trajectory(cached, name, **how)
    assert computed == [1, count, 1, 1]
    apart, _, computed = trajectory(cached, name, sequential=True, **how)
    assert computed == [1] * (3 + count)
    torch.testing.assert_close(apart[-1], batched[-1], rtol=1e-3, atol=1e-3)
    plain, _, _ = trajectory(checkpoint, name, guidance_interval=INTERVAL, **STRENGTHS[name])
    assert torch.equal(batched[1], plain[1])
    assert (batched[2] - plain[2]).abs().max() > 1e-4


def together(folder: Path, name: str) -> Tensor:
    team, checkpoint = Team.start(), models.load_checkpoint(folder)
    layout = Layout.parse("guidance=2" if team.size > 1 else "")
    parallel = share_work(team, layout, len(PREDICTIONS[name]), checkpoint)
    return trajectory(checkpoint, name, parallel, guidance_interval=INTERVAL, **STRENGTHS[name])[0][-1]


def test_two_processes_make_what_one_makes(processes: Any, folder: Path, name: str) -> None:
    alone = together(folder, name)
    for made in processes(2, together, folder, name, timeout=240.0):
        torch.testing.assert_close(made, alone, rtol=1e-4, atol=1e-4)


def test_finished_clips_depend_on_it(checkpoint: Any, name: str) -> None:
    """And videos without it are those of before."""
    without, inside, none = (
        outlined(checkpoint, name, guidance_interval=words, **STRENGTHS[name])[1] for words in ("0-1", INTERVAL, "1-1")
    )
    assert not any("interval" in kept for kept in without.settings)
    assert inside.settings == without.settings | {"guidance interval": [0.2, 0.6]}
    assert inside.predictions == without.predictions == len(PREDICTIONS[name])
    assert none.predictions == 1
    assert not any("interval" in warning for warning in inside.warnings)
    idle = outlined(checkpoint, name, guidance_interval=INTERVAL, **NONE[name])[1].warnings
    assert "`--guidance-interval` has no effect without guidance." in idle
    with pytest.raises(ValueError, match=r"^generate: guidance_interval must be BEGIN-END.* got '0.8-0.2'$"):
        families.get(name).options(guidance_interval="0.8-0.2")


def test_a_negative_prompt_is_idle_where_no_prediction_takes_it(checkpoint: Any, name: str) -> None:
    """At guidance 0 every prediction does; where the voice alone is guided, none."""
    idle = "`--negative-prompt` has no effect at guidance 1."

    def warned(**options: Any) -> bool:
        return idle in outlined(checkpoint, name, negative_prompt="rain", **options)[1].warnings

    silent = {"audio_guidance": 0.0} if name == "gloria" else {}
    assert not warned(guidance=0.0, **silent)
    assert not warned(**STRENGTHS[name])
    assert warned(**NONE[name])
    if name == "gloria":
        assert warned(guidance=1.0, audio_guidance=3.0)


def test_saved_workflows_find_their_values(name: str) -> None:
    """They know them by their places: what is new stands behind what was there."""
    names = [one.name for one in dataclasses.fields(families.get(name).options)]
    before = {"wan_i2v": "compile", "gloria": "attention_figure"}[name]
    assert names[14] == "compile"
    assert names.index("guidance_interval") == names.index(before) + 1
