# SPDX-License-Identifier: Apache-2.0
"""Solvers of the flow x_s = (1 - s) x_0 + s noise, with the noise levels of the official Wan programs.

They are those of diffusers: UniPC (arXiv:2302.04867) and DPM-Solver++ (arXiv:2211.01095), both of second order, and
Euler's method, which models that are distilled to a few steps were trained for. Their own flow schedules differ a
little from the official ones (they run from 1 to 1/1000, or from 0.999), so the levels are given to them,
s' = shift s / (1 + (shift - 1) s) of evenly spaced s:

    "unipc"    s from 0.999 down towards 0
    "dpm++"    s from 1 down towards 0
    "euler"    s from 1 down towards 0

Timesteps are 1000 s', cut to integers but for Euler's; the last level is 0. With these, levels, timesteps and solutions
of the first two are the official ones to the last bit in float32. Those of "euler" are LightX2V's for distilled models:
4 steps with shift 5 are its list 1000, 750, 500, 250.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SOLVERS = ("unipc", "dpm++", "euler")
TRAIN_TIMESTEPS = 1000


def check_solver(name: str, steps: int, shift: float) -> None:
    """Are these arguments of `flow_solver`?

    Raises:
        ValueError: another name, no steps, or a shift that is not positive.
    """
    if name not in SOLVERS:
        raise ValueError(f"flow_solver: name must be one of {', '.join(SOLVERS)}, got {name!r}")
    if steps < 1:
        raise ValueError(f"flow_solver: steps must be at least 1, got {steps}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"flow_solver: shift must be a positive number, got {shift}")


def flow_solver(name: str, steps: int, shift: float, device: torch.device | str = "cpu") -> Any:
    """A diffusers scheduler that is set to solve one clip. It keeps state: make a new one for every clip.

    Args:
        name: "unipc", "dpm++" or "euler".
        steps: evaluations of the model.
        shift: of the noise levels; 1 is none, more spends more steps at high noise.
        device: of its `timesteps` [steps], int64 (float32 of "euler").

    Returns:
        The scheduler: `solver.step(velocity, timestep, x, return_dict=False)[0]` is the next x.

    Raises:
        ValueError: see `check_solver`.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    check_solver(name, steps, shift)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    solver: Any
    if name == "unipc":
        solver = UniPCMultistepScheduler(**flow)
        highest = float(np.float32(1 - 1 / TRAIN_TIMESTEPS))
        solver.set_timesteps(sigmas=np.linspace(highest, 0, steps + 1)[:-1], device=device)
    elif name == "euler":
        solver = FlowMatchEulerDiscreteScheduler(shift=shift)
        solver.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist(), device=device)
    else:
        solver = DPMSolverMultistepScheduler(**flow)
        solver.set_timesteps(steps, device=device)
        # This one takes no levels; both lists are public and read only in `step`.
        levels = np.linspace(1, 0, steps + 1)[:-1]
        levels = shift * levels / (1 + (shift - 1) * levels)
        solver.sigmas = torch.from_numpy(np.append(levels, 0).astype(np.float32))
        solver.timesteps = torch.from_numpy(levels * TRAIN_TIMESTEPS).to(device=device, dtype=torch.int64)
    solver.set_begin_index(0)  # else it looks the first timestep up, which waits for the device
    return solver
