# SPDX-License-Identifier: Apache-2.0
"""frame_linear, the output side of an absorbed audio cross-attention, against a batched product and its epilogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.cases import Benchmark, Case, Rand, SmallCase, size
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops


def cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    frames, height, width = shape.video
    per_frame, channels = height * width, shape.heads * shape.dim
    tokens, inner = frames * per_frame, shape.heads * shape.audio

    def inputs() -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        weights = torch.randn(1, tokens, inner, **options).softmax(-1)
        values = torch.randn(1, frames, inner, channels, **options)
        return weights, values, torch.randn(channels, **options), torch.randn(1, tokens, channels, **options)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
        return ops.frame_linear(x, weight, per_frame, bias=bias, residual=residual, out=out)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + (x.unflatten(1, (frames, -1)) @ weight + bias).flatten(1, 2)

    given = inputs()
    yield Case(
        "frame_linear",
        shape.name,
        tokens,
        dtype,
        "forward",
        bytes=size(*given, given[-1]),
        inputs=inputs,
        ours=ours,
        baselines={"eager": eager},
        compiled=eager,
    )


def small(rand: Rand) -> Iterator[SmallCase]:
    def run(op: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return op(x, weight, 35, token_offset=10, bias=bias, residual=residual)

    for inner, dim in ((40, 136), (15, 37)):
        shapes = ((2, 90, inner), (2, 4, inner, dim), (dim,), (2, 90, dim))
        yield SmallCase(
            f"frame_linear {inner} x {dim}",
            lambda *t: run(ops.frame_linear, *t),
            lambda *t: run(ops.frame_linear_reference, *t),
            tuple(rand(*shape) for shape in shapes),
            gradients=False,
        )


BENCH = Benchmark(TOKENS, cases, small, headline="frame_linear")
