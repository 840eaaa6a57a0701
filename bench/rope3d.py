# SPDX-License-Identifier: Apache-2.0
"""rope3d of one tensor against real arithmetic, the same compiled, and complex128 as official Wan code rotates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.cases import Benchmark, Case, LargeCase, Rand, SmallCase, size
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops


def rotate_real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Eager and compiled baseline: float32 tables [N, 1, D / 2] made beforehand."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def rotate_complex(x: Tensor, rotations: Tensor) -> Tensor:
    """Official baseline: sample by sample in complex128, rotations [N, 1, D / 2] made beforehand."""
    samples = []
    for sample in x:
        pairs = torch.view_as_complex(sample.to(torch.float64).unflatten(-1, (-1, 2)))
        samples.append(torch.view_as_real(pairs * rotations).flatten(-2))
    return torch.stack(samples).to(x.dtype)


def tables(layout: ops.RopeLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin (float32) and rotations (complex128), [N, 1, D / 2]."""
    rotations = layout.rotations()[:, None].to(device)
    return rotations.real.float().contiguous(), rotations.imag.float().contiguous(), rotations


def triton_rotary(cos: Tensor, sin: Tensor) -> dict[str, Callable[..., Any]]:
    """The Triton kernel of flash-attn, where that is installed; tables [N, 1, D / 2]."""
    try:
        rotary: Any = import_module("flash_attn.layers.rotary")
    except ImportError:
        return {}
    cos, sin = cos[:, 0].contiguous(), sin[:, 0].contiguous()
    return {"triton": lambda x: rotary.apply_rotary_emb(x, cos.to(x.dtype), sin.to(x.dtype), interleaved=True)}


def cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    layout = shape.layout()
    cos, sin, rotations = tables(layout, device)

    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(1, shape.tokens, shape.heads, shape.dim, device=device, dtype=dtype),)

    for direction in ("forward", "backward"):
        yield Case(
            "rope3d",
            shape.name,
            shape.tokens,
            dtype,
            direction,
            bytes=2 * size(*inputs()),
            inputs=inputs,
            ours=lambda x, out=None: ops.rope3d(x, layout, out=out),
            baselines={
                "eager": lambda x: rotate_real(x, cos, sin),
                "official": lambda x: rotate_complex(x, rotations),
            },
            compiled=lambda x: rotate_real(x, cos, sin),
            optional=triton_rotary(cos, sin) if device.type == "cuda" else {},
        )


def small_layouts() -> Iterator[tuple[int, str, ops.RopeLayout]]:
    """Head dim, pairing, and a layout of 140 tokens."""
    for dim, pairing in ((128, "interleaved"), (64, "half"), (22, "interleaved")):
        other = 2 * (dim // 6)
        segments = [ops.Segment(range(3), range(5), range(7)), ops.Segment([30], range(5), range(7))]
        yield dim, pairing, ops.RopeLayout(segments, split=(dim - 2 * other, other, other), pairing=pairing)


def small(rand: Rand) -> Iterator[SmallCase]:
    for dim, pairing, layout in small_layouts():
        yield SmallCase(
            f"rope3d {dim} {pairing}",
            lambda x, at=layout: ops.rope3d(x, at, token_offset=9),
            lambda x, at=layout: ops.rope3d_reference(x, at, token_offset=9),
            (rand(2, 101, 5, dim),),
            compile=dim == 128,
        )


def large(shape: TokenShape, rand: Rand) -> Iterator[LargeCase]:
    layout = shape.layout()
    yield LargeCase("rope3d", lambda x: ops.rope3d(x, layout), (rand(shape.tokens, shape.heads, shape.dim),))


BENCH = Benchmark(TOKENS, cases, small, large, early=True)
