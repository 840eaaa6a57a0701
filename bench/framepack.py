# SPDX-License-Identifier: Apache-2.0
"""framepack of Wan-S2V's history against one Conv3d per bucket (official) and patches times a matrix (eager)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Benchmark, Case, Rand, SmallCase, size
from talkingdit import ops


@dataclass(frozen=True)
class HistoryShape:
    """Latents [1, channels, frames, height, width] packed at three scales into tokens of ``out`` channels."""

    name: str
    frames: int
    height: int
    width: int
    out: int
    channels: int = 16


SHAPES = {
    "cpu": [HistoryShape("history-56x104-1536", 19, 56, 104, 1536)],
    "cuda": [
        HistoryShape("history-56x104-5120", 19, 56, 104, 5120),
        HistoryShape("history-88x128-5120", 19, 88, 128, 5120),
    ],
    "quick": [HistoryShape("tiny", 19, 16, 16, 32, channels=4)],
}

_BUCKETS = (([18], (1, 2, 2)), ([16, 17], (2, 4, 4)), (list(range(16)), (4, 8, 8)))


def _conv3d(latents: Tensor, *parameters: Tensor) -> Tensor:
    parts = []
    for (frames, kernel), weight, bias in zip(_BUCKETS, parameters[::2], parameters[1::2], strict=True):
        chosen = latents[:, :, frames[0] : frames[-1] + 1]
        parts.append(F.conv3d(chosen, weight, bias, stride=kernel).flatten(2).transpose(1, 2))
    return torch.cat(parts, dim=1)


def _linear(latents: Tensor, *parameters: Tensor) -> Tensor:
    parts = []
    for (frames, (kt, kh, kw)), weight, bias in zip(_BUCKETS, parameters[::2], parameters[1::2], strict=True):
        chosen = latents[:, :, frames[0] : frames[-1] + 1]
        cut = chosen.unflatten(4, (-1, kw)).unflatten(3, (-1, kh)).unflatten(2, (-1, kt))
        patches = cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        parts.append(F.linear(patches, weight.flatten(1), bias))
    return torch.cat(parts, dim=1)


def _ours(latents: Tensor, *parameters: Tensor, out: Tensor | None = None, kernel: str = "auto") -> Tensor:
    tensors: Sequence[Tensor] = parameters
    buckets = [
        ops.Bucket(frames, patch, weight, bias)
        for (frames, patch), weight, bias in zip(_BUCKETS, tensors[::2], tensors[1::2], strict=True)
    ]
    return ops.framepack(latents, buckets, padding="none", out=out, kernel=kernel)


def cases(shape: HistoryShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    def inputs() -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        latents = torch.randn(1, shape.channels, shape.frames, shape.height, shape.width, **options)
        parameters = []
        for _, kernel in _BUCKETS:
            weight = torch.randn(shape.out, shape.channels, *kernel, **options)
            parameters += [weight * weight[0].numel() ** -0.5, torch.randn(shape.out, **options)]
        return latents, *parameters

    given = inputs()
    tokens = _ours(*given)
    for direction, passes in (("forward", 1), ("backward", 2)):  # backward: inputs and gradient in, gradients out
        kernels = ("general", "cutlass", "library") if device.type == "cuda" and direction == "forward" else ()
        optional: dict[str, Callable[..., Tensor]] = {name: partial(_ours, kernel=name) for name in kernels}
        if not (dtype == torch.bfloat16 and device.type == "cpu"):
            # oneDNN gets such a convolution wrong in bfloat16 on CPUs with AMX (findings/conv3d_bf16_amx.sh), and takes
            # minutes for its gradients.
            optional["official"] = _conv3d
        yield Case(
            "framepack",
            shape.name,
            tokens.shape[1],
            dtype,
            direction,
            bytes=size(tokens) + passes * size(*given),
            inputs=inputs,
            ours=_ours,
            baselines={"eager": _linear},
            compiled=_linear,
            optional=optional,
        )


def small(rand: Rand) -> Iterator[SmallCase]:
    kernels, frames = [(1, 2, 2), (1, 4, 4), (4, 8, 8)], [[18], [16, 17], range(16)]

    def run(op: Callable[..., Tensor], latents: Tensor, *weights: Tensor) -> Tensor:
        buckets = [ops.Bucket(f, k, w) for f, k, w in zip(frames, kernels, weights, strict=True)]
        return op(latents, buckets, padding="replicate")

    yield SmallCase(
        "framepack",
        lambda *v: run(ops.framepack, *v),
        lambda *v: run(ops.framepack_reference, *v),
        (rand(1, 16, 19, 22, 30), *(rand(64, 16, *kernel) for kernel in kernels)),
    )


BENCH = Benchmark(SHAPES, cases, small)
