# SPDX-License-Identifier: Apache-2.0
"""Which steps are skipped: every decision as the official programs make it, and what users may get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import Processes
from safetensors import safe_open

from talkingdit.pipelines.long_video import OverlapBlend, denoise
from talkingdit.pipelines.step_cache import PUBLISHED, BlockCache, TeaCache, WindowCaches, fit

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "teacache.safetensors"


def cases() -> dict[str, dict]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["spec"])["cases"]


def load(name: str) -> tuple[dict[str, list[torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Inputs of all generations by branch, decisions and sums of all calls."""
    case = cases()[name]
    with safe_open(GOLDEN, "pt") as file:
        names = [key.rsplit("/", 1)[1] for key in file.keys() if key.startswith(f"{name}/in/")]  # noqa: SIM118
        inputs = {}
        for key in names:
            steps = list(file.get_tensor(f"{name}/in/{key}"))
            scales = [1.0, case.get("second_generation_input_scale", 1.0)][: case["generations"]]
            inputs[key] = [step * scale for scale in scales for step in steps]
        return inputs, file.get_tensor(f"{name}/out/compute"), file.get_tensor(f"{name}/out/accumulated")


def caches(case: dict, branches: int) -> list[TeaCache]:
    steps = case["sample_steps"]
    first, last = 1, 1
    if case["kind"] == "wan2.1":  # calls of both branches are counted
        first, last = case["ret_calls"] // 2, (2 * steps - case["cutoff_calls"]) // 2
    made = dict(steps=steps, first=first, last=last)
    return [TeaCache(case["coefficients"], case["threshold"], **made) for _ in range(branches)]


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("name", cases())
def test_every_decision_is_the_official_one(name: str, planned: bool) -> None:
    inputs, compute, accumulated = load(name)
    made = caches(cases()[name], len(inputs))
    branches = list(inputs.values())
    if planned:
        decisions = [cache.plan(branch) for cache, branch in zip(made, branches, strict=True)]
        got = [decision for step in zip(*decisions, strict=True) for decision in step]
        assert got == compute.tolist()
        return
    sums, got = [], []
    for step in zip(*branches, strict=True):
        for cache, modulated in zip(made, step, strict=True):
            got.append(cache.compute(modulated))
            sums.append(cache.accumulated)
    assert got == compute.tolist()
    np.testing.assert_allclose(sums, accumulated.numpy(), atol=1e-5, rtol=1e-5)
    assert not all(got)


def test_published_sets_are_the_official_ones() -> None:
    with safe_open(GOLDEN, "pt") as file:
        spec = json.loads(file.metadata()["spec"])
    for name, official in spec["official_coefficients"].items():
        ours = PUBLISHED[f"wan2.1-{name.lower().replace('_', '-').replace('-ret', '-early')}"]
        assert list(ours.coefficients) == pytest.approx(official["coefficients"], rel=1e-12)
        assert ours.projected == official["use_ret_steps"]
    assert list(PUBLISHED["hunyuan-video"].coefficients) == pytest.approx(spec["hunyuan_coefficients"])


def test_a_threshold_of_zero_computes_every_step() -> None:
    cache = TeaCache([1.0, 0.0], 0.0, steps=5)
    assert cache.plan([torch.ones(4)] * 10) == [True] * 10


def test_plans_and_single_steps_go_on_over_videos() -> None:
    inputs = [torch.full((4,), 1.0 + 0.01 * i) for i in range(12)]
    whole, parts = (TeaCache([10.0, 0.0], 0.25, steps=6) for _ in range(2))
    assert whole.plan(inputs) == parts.plan(inputs[:5]) + [parts.compute(x) for x in inputs[5:]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(threshold=-0.1, steps=4), "threshold must be a number of at least 0, got -0.1"),
        (dict(threshold=float("nan"), steps=4), "threshold must be"),
        (dict(threshold=0.1, steps=0), "steps and first must be at least 1"),
        (dict(threshold=0.1, steps=4, first=0), "steps and first must be at least 1"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeaCache([1.0], **arguments)
    with pytest.raises(ValueError, match="finite"):
        TeaCache([], 0.1, steps=4)


def test_a_fit_finds_the_polynomial_that_made_the_changes() -> None:
    x = np.linspace(0.01, 0.3, 20)
    made = [3.0, -2.0, 0.5, 1.5, 0.01]
    assert fit(x.tolist(), np.polyval(made, x).tolist()) == pytest.approx(made, rel=1e-6, abs=1e-8)
    assert len(fit([0.1, 0.2, 0.2], [0.3, 0.5, 0.5])) == 2
    with pytest.raises(ValueError, match="two different ones"):
        fit([0.1, 0.1], [0.2, 0.3])


# ---- Several processes, several windows ------------------------------------------------------------------------------
INPUTS = [torch.full((7, 3), 1.0 + 0.05 * i) + 0.1 * torch.arange(21).view(7, 3) for i in range(8)]


def _decisions_of_shards(cuts: list[int]) -> list[bool]:
    begin = cuts[dist.get_rank()]
    end = cuts[dist.get_rank() + 1]
    cache = TeaCache([8.0, 0.0], 0.3, steps=8)
    return [cache.compute(x[begin:end], dist.group.WORLD) for x in INPUTS]


def test_processes_that_share_the_tokens_decide_as_one(processes: Processes) -> None:
    alone = TeaCache([8.0, 0.0], 0.3, steps=8)
    wanted = [alone.compute(x) for x in INPUTS]
    assert len(set(wanted)) == 2
    assert processes(2, _decisions_of_shards, [0, 5, 7]) == [wanted, wanted]


@pytest.mark.parametrize("host", [False, True])
def test_windows_keep_what_is_theirs(host: bool) -> None:
    computed, sigmas = [True, False, True, False], [1.0, 0.7, 0.5, 0.2, 0.0]
    caches, ran = WindowCaches(2, computed, host), []

    def blocks(x: torch.Tensor, branch: int, cache: BlockCache) -> torch.Tensor:
        if not cache.skips:
            ran.append(branch)
            cache.keep(x.sin() * (1 + branch) + x.mean())
        return x * 0.5 + cache.kept

    def predict(window: torch.Tensor, frames: torch.Tensor, step: int) -> list[torch.Tensor]:
        found = [blocks(window, k, cache) for k, cache in enumerate(caches.begin(step, frames, "cpu"))]
        caches.end(frames)
        return found

    x = torch.randn(2, 14, 2, 2, dtype=torch.float64)
    plan = OverlapBlend(6, 2)
    got = denoise(x, sigmas, plan, predict, lambda step: [1.5, -0.5])
    kept: dict[tuple[int, int], torch.Tensor] = {}
    for step in range(4):
        windows, result = plan.windows(14, step), torch.zeros_like(x)
        for i, start in enumerate(windows.starts):
            shown = x[:, start : start + 6]
            for k in range(2):
                if computed[step]:
                    kept[i, k] = shown.sin() * (1 + k) + shown.mean()
            v = 1.5 * (shown * 0.5 + kept[i, 0]) - 0.5 * (shown * 0.5 + kept[i, 1])
            weights = windows.weights[i, :, None, None]
            result[:, start : start + 6] += weights * (shown + (sigmas[step + 1] - sigmas[step]) * v)
        x = result
    torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-11)
    assert len(ran) == 2 * 2 * 3  # steps, branches, windows
