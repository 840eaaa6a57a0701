# SPDX-License-Identifier: Apache-2.0
"""Guidance in an interval of the steps: outside only the conditioned prediction is made, whoever makes the others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_s2v import AUDIO_DIM, LAYERS, make_s2v
from torch import Tensor

from talkingdit.distributed.layout import Layout, Parallel
from talkingdit.distributed.team import Team
from talkingdit.families.hunyuan_avatar.checkpoint import HunyuanAvatarSettings
from talkingdit.families.hunyuan_avatar.guidance import GuidanceView, StepGuidance
from talkingdit.families.hunyuan_avatar.options import Options as AvatarOptions
from talkingdit.families.hunyuan_avatar.outline import outline as avatar_outline
from talkingdit.families.hunyuan_avatar.pipeline import HunyuanAvatarPipeline
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.options import Options
from talkingdit.families.wan_s2v.outline import Sampling, outline
from talkingdit.families.wan_s2v.pipeline import VideoConditions, WanS2VPipeline
from talkingdit.pipelines.inputs import Inputs, Job
from talkingdit.pipelines.parallel import share_work
from talkingdit.pipelines.solvers import flow_solver
from talkingdit.pipelines.step_cache import FILE, Fitted, decide, write_fitted

SIDE, STEPS, GUIDED = 32, 5, (1, 2)
INTERVAL = "0.2-0.6"  # of five steps, those two


# ---- Wan-S2V ---------------------------------------------------------------------------------------------------------
def s2v(parallel: Parallel | None = None, folder: Path | None = None, **options: Any) -> tuple[Any, VideoConditions]:
    checkpoint = make_s2v()
    if folder is not None:
        checkpoint = dataclasses.replace(checkpoint, folder=folder)
    pipeline = WanS2VPipeline(checkpoint, parallel)
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    sampling = Sampling.of(Options(steps=STEPS, clip_frames=8, **options), checkpoint.settings)
    voice = torch.randn(LAYERS, AUDIO_DIM, 8, generator=torch.Generator().manual_seed(7))
    return pipeline, pipeline.conditions(image, "a face", sampling, voice)


@torch.no_grad()
def latents(parallel: Parallel | None = None, folder: Path | None = None, **options: Any) -> tuple[Tensor, list[int]]:
    """Of the first clip, and how many samples each forward pass had."""
    pipeline, video = s2v(parallel, folder, **options)
    samples: list[int] = []
    hook = pipeline.checkpoint.transformer.register_forward_hook(lambda _, given, out: samples.append(len(given[0])))
    made = pipeline._denoise(video, 0, None, None)
    hook.remove()
    return made, samples


@torch.no_grad()
def told(solver_name: str) -> Tensor:
    """The same loop, told plainly."""
    pipeline, video = s2v(guidance=3.0, solver=solver_name)
    model, sampling = pipeline.checkpoint.transformer, video.sampling
    solver = flow_solver(solver_name, STEPS, sampling.shift)
    x = pipeline._noise((16, 2, SIDE // 8, SIDE // 8), 0)
    sound = video.features[..., :8][None]
    for step, time in enumerate(solver.timesteps):
        velocity = model(x, time[None].float(), WanInputs(video.text[:1], reference=video.reference, audio=sound))
        if step in GUIDED:
            without = model(
                x, time[None].float(), WanInputs(video.text[1:], reference=video.reference, audio=0 * sound)
            )
            velocity = without + 3.0 * (velocity - without)
        x = solver.step(velocity, time, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_only_steps_inside_are_guided(solver: str) -> None:
    wanted = told(solver)
    for sequential, samples in ((False, [1, 2, 2, 1, 1]), (True, [1] * 7)):
        made, found = latents(guidance=3.0, solver=solver, guidance_interval=INTERVAL, sequential=sequential)
        assert found == samples
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - latents(guidance=3.0, solver=solver)[0]).abs().max() > 1e-2


def test_all_steps_and_none() -> None:
    assert torch.equal(latents(guidance=3.0)[0], latents(guidance=3.0, guidance_interval="0-1")[0])
    none, samples = latents(guidance=3.0, guidance_interval="0.5-0.5")
    assert samples == [1] * STEPS
    assert torch.equal(none, latents(guidance=1.0)[0])


def test_no_prediction_goes_on_from_what_another_left(tmp_path: Path) -> None:
    """A step cache begins anew where the interval begins and ends: steps 1 and 3."""
    assert decide(torch.arange(1.0, 6.0)[:, None], 1e9, Fitted((1.0, 0.0)), (1, 3)) == [True, True, False, True, True]
    write_fitted(tmp_path / FILE, Fitted((1.0, 0.0)))
    how: dict[str, Any] = {"guidance": 3.0, "guidance_interval": INTERVAL, "step_cache": 1e9}
    batched = latents(folder=tmp_path, **how)[0]
    torch.testing.assert_close(latents(folder=tmp_path, sequential=True, **how)[0], batched, rtol=1e-4, atol=1e-4)
    assert (batched - latents(guidance=3.0, guidance_interval=INTERVAL)[0]).abs().max() > 1e-4


# ---- HunyuanVideo-Avatar ---------------------------------------------------------------------------------------------
class Network:
    """Predicts by what it is given, and tells what it was asked: views of each forward pass, and whether it skipped."""

    dtype, device, config = torch.float32, torch.device("cpu"), SimpleNamespace(hidden_size=3072)

    def __init__(self) -> None:
        self.asked: list[tuple[GuidanceView, ...]] = []
        self.kept: dict[Any, Any] = {}
        self.stale: list[int] = []

    def __call__(self, x: Tensor, timestep: Tensor, *, context: Any, cache: Any, views: Any) -> Tensor:
        self.asked.append(tuple(views))
        if cache is not None and not cache.compute and self.kept.get(cache) != views:
            self.stale.append(len(self.asked) - 1)
        elif cache is not None and cache.compute:
            self.kept[cache] = views
        given = torch.tensor([0.3 * view.text + 0.5 * view.audio for view in views])
        return 0.5 * x + given.view(-1, 1, 1, 1, 1) * (1 + timestep.view(-1, 1, 1, 1, 1) / 1000)

    def step_input(self, x: Tensor, timestep: Tensor, inputs: Any) -> Tensor:
        return torch.ones(4)  # never changes


def avatar(
    guidance: StepGuidance,
    monkeypatch: pytest.MonkeyPatch | None = None,
    parallel: Parallel | None = None,
    **options: Any,
) -> tuple[Tensor, Network]:
    network = Network()
    pipeline: Any = HunyuanAvatarPipeline.__new__(HunyuanAvatarPipeline)
    pipeline.checkpoint = SimpleNamespace(transformer=network, folder=Path("nowhere"))
    pipeline.settings = HunyuanAvatarSettings(window=5, shift_offset=2)
    pipeline.parallel = Parallel() if parallel is None else parallel
    pipeline.recorder = pipeline._changes = None
    if monkeypatch is not None:
        monkeypatch.setattr(pipeline, "_step_inputs", lambda *given: lambda x, step: torch.ones(4), raising=False)
    details = SimpleNamespace(guidance=guidance, options=AvatarOptions(**options))
    conditions = SimpleNamespace(details=details, arguments=lambda frames, views, mask, fps: {"views": views})
    noise = torch.randn(1, 4, 5, 2, 2, generator=torch.Generator().manual_seed(1))
    return pipeline._denoise(conditions, noise, 0, guidance.steps, None), network


@pytest.mark.parametrize("strengths", [{}, {"text": 3.0, "audio": 4.0}], ids=["released", "separate"])
def test_an_avatar_is_guided_inside_alone(strengths: dict[str, float]) -> None:
    whole = StepGuidance(STEPS, early_steps=2, **strengths)
    guidance = dataclasses.replace(whole, interval=(0.2, 0.6))
    given = (GuidanceView(text=True, audio=True),)
    assert guidance.predictions == whole.predictions == (3 if strengths else 2)
    for step in range(STEPS):
        inside = step in GUIDED
        assert guidance.views(step) == (whole.views(step) if inside else given)
        assert guidance.coefficients(step) == (whole.coefficients(step) if inside else [1.0])
    made, network = avatar(guidance)
    assert [len(views) for views in network.asked] == [guidance.predictions if s in GUIDED else 1 for s in range(STEPS)]
    torch.testing.assert_close(avatar(guidance, sequential=True)[0], made)
    none = avatar(dataclasses.replace(whole, interval=(0.5, 0.5)))[0]
    assert torch.equal(none, avatar(StepGuidance(STEPS, start=1.0))[0])
    assert (none - made).abs().max() > 1e-2


def test_released_step_cache_begins_anew_with_other_predictions() -> None:
    """By its schedule step 10 of 20, where the negative prompt goes, would run on what the negative prompt left."""
    for interval in ((0.0, 1.0), (0.2, 0.8)):
        for sequential in (False, True):
            guidance = StepGuidance(20, interval=interval)
            made, network = avatar(guidance, step_cache="released", sequential=sequential)
            assert not network.stale
            assert made.isfinite().all()


def test_an_avatars_predictions_are_used_again_by_their_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    guidance = StepGuidance(10, early_steps=0, interval=(0.3, 0.7))
    _, network = avatar(guidance, monkeypatch, step_cache=1e9)
    assert [len(views) for views in network.asked] == [1, 2, 1, 1]  # the first, both changes, and the last


# ---- Both ------------------------------------------------------------------------------------------------------------
def together() -> tuple[Tensor, Tensor]:
    team, model = Team.start(), make_s2v()
    parallel = share_work(team, Layout.parse("guidance=2" if team.size > 1 else ""), 2, model)
    guidance = StepGuidance(STEPS, early_steps=2, interval=(0.2, 0.6))
    made = latents(parallel, guidance=3.0, guidance_interval=INTERVAL)[0]
    return made, avatar(guidance, parallel=parallel)[0]


def test_two_processes_make_what_one_makes(processes: Any) -> None:
    alone = together()
    results = processes(2, together, timeout=240.0)
    for made in results:
        for found, wanted, first in zip(made, alone, results[0], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            assert torch.equal(found, first)


@pytest.mark.parametrize("options", [Options, AvatarOptions])
@pytest.mark.parametrize("words", ["", "0.5", "0.8-0.2", "-0.1-0.5", "0-1.5", "nan-1", "0.2-0.4-0.6", "a-b"])
def test_what_is_no_interval(options: Any, words: str) -> None:
    with pytest.raises(
        ValueError, match=r"^generate: guidance_interval must be BEGIN-END, shares of the steps"
    ) as error:
        options(guidance_interval=words)
    assert str(error.value).endswith(f"such as 0.2-0.8, got {words!r}")


def test_finished_clips_depend_on_it(tmp_path: Path) -> None:
    """And videos without it are those of before."""
    job = Job(image=tmp_path / "a.png", audio=tmp_path / "a.wav", output=tmp_path / "out.mp4")
    inputs = Inputs(job, np.zeros((64, 64, 3), np.uint8), np.zeros(1600, np.float32))
    checkpoint = make_s2v()
    for outlined, settings, options in (
        (outline, checkpoint.settings, Options),
        (avatar_outline, HunyuanAvatarSettings(), AvatarOptions),
    ):
        without, inside = (outlined(inputs, settings, options(guidance_interval=words)) for words in ("0-1", INTERVAL))
        assert "guidance interval" not in without.settings
        assert inside.settings == without.settings | {"guidance interval": [0.2, 0.6]}
        assert inside.predictions == 2
        idle = outlined(inputs, settings, options(guidance=1.0, guidance_interval=INTERVAL)).warnings
        assert sum("`--guidance-interval` has no effect" in words for words in idle) == 1
