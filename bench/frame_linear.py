# SPDX-License-Identifier: Apache-2.0
"""frame_linear, the output side of an absorbed audio cross-attention, against a batched product and its epilogue.

On a GPU both of its kernels are timed, into a residual stream of the inputs' type and one of float32, beside cuBLAS's
batched product that adds to the stream: the bias is one more row of the values, and one more weight that is always 1.
A gate would be folded into values and bias in the same way, and a mask into the weights, all of it once per clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import Benchmark, Case, Rand, SmallCase, size
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops


def cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    yield _case(shape, shape.name, dtype, device, dtype)
    if device.type == "cuda" and dtype != torch.float32:
        yield _case(shape, f"{shape.name} fp32 stream", dtype, device, torch.float32)


def _case(shape: TokenShape, name: str, dtype: torch.dtype, device: torch.device, stream: torch.dtype) -> Case:
    frames, height, width = shape.video
    per_frame, channels = height * width, shape.heads * shape.dim
    tokens, inner = frames * per_frame, shape.heads * shape.audio
    room = -(-(inner + 1) // 8) * 8  # of the folded product: rows of whole pieces of 16 bytes

    def inputs() -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        weights = torch.randn(1, tokens, inner, **options).softmax(-1)
        values = torch.randn(1, frames, inner, channels, **options)
        bias = torch.randn(channels, **options)
        residual = torch.randn(1, tokens, channels, **options).to(stream)
        if device.type == "cpu":
            return weights, values, bias, residual
        wide, folded = weights.new_zeros(1, tokens, room), values.new_zeros(1, frames, room, channels)
        wide[..., :inner], wide[..., inner] = weights, 1
        folded[:, :, :inner], folded[:, :, inner] = values, bias
        return weights, values, bias, residual, wide, folded

    def ours(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *_: Tensor, out: Tensor | None = None, **how: str
    ) -> Tensor:
        return ops.frame_linear(x, weight, per_frame, bias=bias, residual=residual, out=out, **how)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *_: Tensor) -> Tensor:
        return residual + (x.unflatten(1, (frames, -1)) @ weight + bias).flatten(1, 2)

    def baddbmm(*given: Tensor) -> Tensor:
        residual, wide, folded = given[3:]
        batch = residual[0].unflatten(0, (frames, -1)), wide[0].unflatten(0, (frames, -1)), folded[0]
        options = {} if stream == dtype else {"out_dtype": stream}
        return torch.baddbmm(*batch, **options).flatten(0, 1)[None]

    given = inputs()[:4]
    names = ("general", "cutlass") if device.type == "cuda" else ()
    optional: dict[str, Callable[..., Tensor]] = {name: partial(ours, kernel=name) for name in names}
    return Case(
        "frame_linear",
        name,
        tokens,
        dtype,
        "forward",
        bytes=size(*given, given[-1]),
        inputs=inputs,
        ours=ours,
        baselines={"eager": eager},
        compiled=eager,
        optional={**optional, "baddbmm": baddbmm} if device.type == "cuda" else {},
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
