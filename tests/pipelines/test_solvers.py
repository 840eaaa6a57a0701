# SPDX-License-Identifier: Apache-2.0
"""Solvers: noise levels and whole solutions of the official programs, recorded, and the truth for a known flow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from talkingdit.pipelines.solvers import SOLVERS, flow_solver

GOLDEN = Path(__file__).parents[1] / "golden" / "flow_solvers.safetensors"
CASES = ("unipc/40/3", "unipc/5/3", "unipc/1/3", "unipc/20/5", "dpm++/40/3", "dpm++/5/3", "dpm++/1/3", "dpm++/20/5")


def golden(name: str) -> Tensor:
    with safe_open(GOLDEN, framework="pt") as file:
        return file.get_tensor(name)


def recorded_velocity(x: Tensor, timestep: float) -> Tensor:
    """The velocity that the recorded solutions were made with."""
    s = timestep / 1000
    return torch.tanh(1.3 * x - 0.4) * (1.2 - 0.7 * s) + 0.3 * torch.sin(3 * x + 2 * s) - 0.2 * s


@pytest.mark.parametrize("case", CASES)
def test_the_official_levels_and_the_official_solution(case: str) -> None:
    name, steps, shift = case.split("/")
    solver = flow_solver(name, int(steps), float(shift))
    torch.testing.assert_close(solver.sigmas, golden(f"{case}/sigmas"), rtol=0, atol=1e-7)
    assert solver.timesteps.tolist() == golden(f"{case}/timesteps").tolist()
    x = golden("in/x")
    for timestep in solver.timesteps:
        x = solver.step(recorded_velocity(x, float(timestep)), timestep, x, return_dict=False)[0]
    torch.testing.assert_close(x, golden(f"{case}/out"), rtol=1e-5, atol=1e-5)


def test_the_record_covers_every_case() -> None:
    with safe_open(GOLDEN, framework="pt") as file:
        assert {key.rsplit("/", 1)[0] for key in file.keys()} == {*CASES, "in"}  # noqa: SIM118
        assert "Wan2.2" in json.loads(file.metadata()["spec"])["source"]


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_lead_to_the_picture_that_the_velocity_points_at(name: str) -> None:
    """With x_0 known, the velocity (x - x_0) / s leads straight to it, whatever the steps."""
    clean, x = torch.randn(2, 3), torch.randn(2, 3)
    solver = flow_solver(name, 4, 3.0)
    for timestep, level in zip(solver.timesteps, solver.sigmas, strict=False):
        x = solver.step((x - clean) / level, timestep, x, return_dict=False)[0]
    torch.testing.assert_close(x, clean, rtol=1e-4, atol=1e-4)


def test_the_schedule_of_models_distilled_to_four_steps() -> None:
    """LightX2V's: the levels of its list 1000, 750, 500, 250 with shift 5, and x + (next level - level) v."""
    solver, x = flow_solver("euler", 4, 5.0), golden("in/x")
    levels = [5 * t / (1000 + 4 * t) for t in (1000, 750, 500, 250)]
    assert solver.timesteps.tolist() == pytest.approx([1000 * level for level in levels], rel=1e-6)
    expected = x.double()
    for timestep, level, following in zip(solver.timesteps, levels, [*levels[1:], 0.0], strict=True):
        x = solver.step(recorded_velocity(x, float(timestep)), timestep, x, return_dict=False)[0]
        expected = expected + (following - level) * recorded_velocity(expected, 1000 * level)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("heun", 4, 3.0), "name must be one of unipc, dpm\\+\\+, euler, got 'heun'"),
        (("unipc", 0, 3.0), "steps must be at least 1, got 0"),
        (("unipc", 4, 0.0), "shift must be a positive number, got 0.0"),
    ],
)
def test_impossible_settings(arguments: tuple[str, int, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        flow_solver(*arguments)
