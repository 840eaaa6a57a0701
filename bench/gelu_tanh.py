# SPDX-License-Identifier: Apache-2.0
"""GELU with tanh behind the first layer of a feed-forward, on CPUs, against PyTorch's and that compiled.

On GPUs the op is PyTorch's, and there is nothing to measure.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import Benchmark, Case, Rand, SmallCase, size
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops

SHAPES = {**TOKENS, "cuda": []}
_WIDER = 35 / 6  # feed-forward of Wan 1.3B, 8,960 of 1,536
_TOKENS = 2048  # a slice, as inference takes them


def cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    width, tokens = int(shape.heads * shape.dim * _WIDER), min(shape.tokens, _TOKENS)

    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(tokens, width, device=device, dtype=dtype),)

    for direction, moved in (("forward", 2), ("backward", 3)):
        yield Case(
            "gelu_tanh",
            f"{shape.name}, {tokens} x {width}",
            tokens,
            dtype,
            direction,
            bytes=moved * size(*inputs()),
            inputs=inputs,
            ours=ops.gelu_tanh,
            baselines={"eager": ops.gelu_tanh_reference},
            compiled=ops.gelu_tanh_reference,
            has_out=False,
        )


def small(rand: Rand) -> Iterator[SmallCase]:
    for shape in ((3, 7, 37), (5, 4096)):
        yield SmallCase(f"gelu_tanh {shape}", ops.gelu_tanh, ops.gelu_tanh_reference, (rand(*shape),))


BENCH = Benchmark(SHAPES, cases, small)
