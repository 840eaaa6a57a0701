# SPDX-License-Identifier: Apache-2.0
"""qk_norm_rope3d over all heads, as Wan normalises, against RMSNorm and rotation one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.cases import Benchmark, Case, LargeCase, Rand, SmallCase, size
from bench.rope3d import rotate_complex, rotate_real, small_layouts, tables
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.flatten(-2).float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (normal.to(x.dtype) * weight).view_as(x)


def _both(rotate: Callable[..., Tensor], *table: Tensor) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(_norm(q, q_weight), *table), rotate(_norm(k, k_weight), *table)

    return run


def cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    layout = shape.layout()
    cos, sin, rotations = tables(layout, device)
    eager = _both(rotate_real, cos, sin)

    def inputs() -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        q, k = (torch.randn(1, shape.tokens, shape.heads, shape.dim, **options) for _ in range(2))
        weights = (torch.rand(shape.heads * shape.dim, **options) + 0.5 for _ in range(2))
        return q, k, *weights

    tensors = size(*inputs()[:2])
    for direction, passes in (("forward", 2), ("backward", 3)):  # backward: gradient and input in, gradient out
        yield Case(
            "qk_norm_rope3d",
            shape.name,
            shape.tokens,
            dtype,
            direction,
            bytes=passes * tensors,
            inputs=inputs,
            ours=lambda q, k, qw, kw, out=None: ops.qk_norm_rope3d(q, k, qw, kw, layout, out=out),
            baselines={"eager": eager, "official": _both(rotate_complex, rotations)},
            compiled=eager,
        )


def small(rand: Rand) -> Iterator[SmallCase]:
    for dim, pairing, layout in small_layouts():
        for norm, width in (("all_heads", 5 * dim), ("per_head", dim)):
            yield SmallCase(
                f"qk_norm_rope3d {dim} {pairing} {norm}",
                lambda *v, at=layout, norm=norm: ops.qk_norm_rope3d(*v, at, norm=norm),
                lambda *v, at=layout, norm=norm: ops.qk_norm_rope3d_reference(*v, at, norm=norm),
                (rand(2, 101, 5, dim), rand(2, 101, 5, dim), rand(width), rand(width)),
            )


def large(shape: TokenShape, rand: Rand) -> Iterator[LargeCase]:
    layout, x = shape.layout(), rand(shape.tokens, shape.heads, shape.dim)
    weight = torch.rand(shape.heads * shape.dim, device=x.device, dtype=x.dtype) + 0.5
    yield LargeCase("qk_norm_rope3d", lambda q: ops.qk_norm_rope3d(q, q, weight, weight, layout)[0], (x,))


BENCH = Benchmark(TOKENS, cases, small, large, early=True, headline="qk_norm_rope3d")
