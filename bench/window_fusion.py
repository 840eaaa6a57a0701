# SPDX-License-Identifier: Apache-2.0
"""window_fusion, and the step fused with guidance and the sampler, against Python loops over windows (official) and
index_add (eager)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases import Benchmark, Case, Rand, SmallCase, size
from talkingdit import ops


@dataclass(frozen=True)
class WindowShape:
    """``count`` windows of ``frames`` latents, ``stride`` apart, over ``length`` latents [channels, height, width]."""

    name: str
    count: int
    frames: int
    stride: int
    channels: int
    height: int
    width: int

    @property
    def starts(self) -> list[int]:
        return [i * self.stride for i in range(self.count)]

    @property
    def length(self) -> int:
        return self.starts[-1] + self.frames


SHAPES = {
    "cpu": [WindowShape("81x60x104-6x21", 6, 21, 12, 16, 60, 104)],
    "cuda": [
        WindowShape("81x60x104-6x21", 6, 21, 12, 16, 60, 104),
        WindowShape("81x90x160-6x21", 6, 21, 12, 16, 90, 160),
        WindowShape("237x90x160-19x21", 19, 21, 12, 16, 90, 160),
    ],
    "quick": [WindowShape("tiny", 3, 5, 3, 4, 4, 6)],
}

_GUIDANCE, _STEP = 4.5, -0.02
_COEFFICIENTS = (1.0, _STEP * _GUIDANCE, _STEP * (1 - _GUIDANCE))  # x + d (u + g (c - u)) of the predictions c, u


def _ramps(shape: WindowShape) -> Tensor:
    """Weights [n, f] that fall linearly over the overlap on both sides."""
    overlap = shape.frames - shape.stride
    ramp = torch.arange(1, overlap + 1, dtype=torch.float64) / (overlap + 1)
    weights = torch.ones(shape.count, shape.frames, dtype=torch.float64)
    weights[1:, :overlap] = ramp
    weights[:-1, -overlap:] = ramp.flip(0)
    return weights


def _loop(shape: WindowShape, table: Tensor) -> Callable[..., Tensor]:
    """Accumulate every window into float32, count weights, divide; ``update`` is called on every window before."""

    def run(windows: Tensor, update: Callable[[int, Tensor], Tensor] = lambda _, window: window) -> Tensor:
        total = torch.zeros(shape.channels, shape.length, shape.height, shape.width, device=windows.device)
        count = torch.zeros(1, shape.length, 1, 1, device=windows.device)
        for i, start in enumerate(shape.starts):
            weight = table[i, :, None, None]
            total[:, start : start + shape.frames] += update(i, windows[i]).float() * weight
            count[:, start : start + shape.frames] += weight
        return (total / count).to(windows.dtype)

    return run


def _loop_step(shape: WindowShape, table: Tensor) -> Callable[..., Tensor]:
    fuse = _loop(shape, table)

    def run(x_t: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        def update(i: int, guided: Tensor) -> Tensor:
            start = shape.starts[i]
            velocity = uncond[i].float() + _GUIDANCE * (guided.float() - uncond[i].float())
            return x_t[:, start : start + shape.frames].float() + _STEP * velocity

        return fuse(cond, update)

    return run


def cases(shape: WindowShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    weights = _ramps(shape).to(device)
    starts = torch.tensor(shape.starts, device=device)
    rates = torch.tensor(_COEFFICIENTS, dtype=torch.float64, device=device)
    loop, loop_step = _loop(shape, weights.float()), _loop_step(shape, weights.float())
    picture = (shape.height, shape.width)

    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(shape.count, shape.channels, shape.frames, *picture, device=device).to(dtype),)

    def step_inputs() -> tuple[Tensor, ...]:
        x_t = torch.randn(shape.channels, shape.length, *picture, device=device).to(dtype)
        return x_t, *inputs(), *inputs()

    latents, windows, _ = (size(t) for t in step_inputs())
    common: dict[str, Any] = {"shape": shape.name, "tokens": shape.length * shape.height * shape.width, "dtype": dtype}
    fusion: dict[str, Any] = {
        **common,
        "bytes": windows + latents,
        "inputs": inputs,
        "ours": lambda w, out=None: ops.window_fusion(w, starts, weights, shape.length, out=out),
    }
    eager = {"eager": lambda w: ops.window_fusion_reference(w, starts, weights, shape.length)}
    yield Case("window_fusion", direction="forward", baselines={**eager, "official": loop}, compiled=loop, **fusion)
    # The loop is for sampling: the gradient of its updates in place takes a copy of the whole video per window.
    yield Case("window_fusion", direction="backward", baselines=eager, **fusion)
    yield Case(
        "fused_window_step",
        **common,
        direction="step",
        bytes=2 * windows + 2 * latents,
        inputs=step_inputs,
        ours=lambda x, c, u, out=None: ops.fused_window_step(x, [c, u], rates, starts, weights, out=out),
        baselines={
            "eager": lambda x, c, u: ops.fused_window_step_reference(x, [c, u], rates, starts, weights),
            "official": loop_step,
        },
        compiled=loop_step,
    )


def small(rand: Rand) -> Iterator[SmallCase]:
    starts, weights = [0, 3, 7], torch.rand(3, 5, dtype=torch.float64) + 0.1
    coefficients = torch.rand(3, 3, dtype=torch.float64)
    for picture in ((24, 40), (5, 7)):
        windows = rand(3, 4, 5, *picture)
        yield SmallCase(
            f"window_fusion {picture}",
            lambda w: ops.window_fusion(w, starts, weights, 12),
            lambda w: ops.window_fusion_reference(w, starts, weights, 12),
            (windows,),
        )
        yield SmallCase(
            f"fused_window_step {picture}",
            lambda x, *p: ops.fused_window_step(x, list(p), coefficients, starts, weights),
            lambda x, *p: ops.fused_window_step_reference(x, list(p), coefficients, starts, weights),
            (rand(4, 12, *picture), windows, rand(3, 4, 5, *picture)),
        )


BENCH = Benchmark(SHAPES, cases, small, early=True, headline="fused_window_step")
