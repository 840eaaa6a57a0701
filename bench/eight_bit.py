# SPDX-License-Identifier: Apache-2.0
"""Rows in eight bits, made in the pass of a norm or alone, against the ops one after the other (eager), and the linear
layer that multiplies them against the one in the layers' own type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Benchmark, Case, LargeCase, Rand, SmallCase, size
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops
from talkingdit.ops import EightBitRows

_KINDS = ("int8", "fp8")


def _tensors(rows: EightBitRows) -> tuple[Tensor, Tensor]:
    return rows.codes, rows.scale


def _after(function: Callable[..., Tensor], kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """What a function makes, in eight bits by plain PyTorch."""
    return lambda *given: _tensors(ops.quantise_rows_reference(function(*given), kind))


def cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    width, ends = shape.heads * shape.dim, shape.ends

    def rows() -> Tensor:
        return torch.randn(1, shape.tokens, width, device=device, dtype=dtype)

    def modulation() -> Tensor:
        return torch.randn(1, len(ends), width, device=device)

    stream, codes = size(rows()), shape.tokens * (width + 4)
    common: dict[str, Any] = {"tokens": shape.tokens, "dtype": dtype, "direction": "forward", "has_out": False}
    for kind in _KINDS:
        name = f"{shape.name}, {kind}"
        yield Case(
            "norm_modulate_eight_bit",
            name,
            **common,
            bytes=stream + codes,
            inputs=lambda: (rows(), modulation(), modulation()),
            ours=lambda *given, kind=kind: _tensors(ops.norm_modulate_eight_bit(*given, kind, ends)),
            baselines={"eager": _after(lambda *given: ops.norm_modulate_reference(*given, ends), kind)},
            rounding=0.002,  # what lies at the border of two codes falls to either side
        )
        yield Case(
            "quantise_rows",
            name,
            **common,
            bytes=stream + codes,
            inputs=lambda: (rows(),),
            ours=lambda x, kind=kind: _tensors(ops.quantise_rows(x, kind)),
            baselines={"eager": _after(lambda x: x, kind)},
        )
        yield Case(
            "eight_bit_linear",
            name,
            **common,
            bytes=codes + stream + width**2,
            inputs=lambda: (rows()[0], torch.randn(width, width, device=device, dtype=dtype)),
            ours=_linear(kind),
            baselines={"eager": F.linear},
            rounding=0.05,
        )


def _linear(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The product with a weight that is made of eight bits once."""
    kept: dict[int, EightBitRows] = {}

    def run(x: Tensor, weight: Tensor) -> Tensor:
        if weight.data_ptr() not in kept:
            kept[weight.data_ptr()] = ops.quantise_rows(weight, kind)
        codes, scale, _ = kept[weight.data_ptr()]
        return ops.eight_bit_linear(ops.quantise_rows(x, kind), codes, scale)

    return run


def small(rand: Rand) -> Iterator[SmallCase]:
    """Fused rows must be those of the ops one after the other: what they differ by is added to the result."""
    groups = [20, 20, 101]
    if rand(1).dtype == torch.float64:
        return  # there are no such rows
    for kind in _KINDS:
        for dim in (1536, 37):
            x, scale, shift = rand(2, 90, dim), rand(2, 3, dim), rand(2, 3, dim)

            def fused(*given: Tensor, kind: str = kind) -> Tensor:
                normal = ops.norm_modulate(*given, groups, token_offset=7)
                rows = ops.norm_modulate_eight_bit(*given, kind, groups, token_offset=7)
                return normal + (rows.wide() - ops.quantise_rows(normal, kind).wide()).to(normal.dtype)

            yield SmallCase(
                f"norm_modulate_eight_bit {kind} {dim}",
                fused,
                lambda *given: ops.norm_modulate_reference(*given, groups, token_offset=7),
                (x, scale, shift),
                gradients=False,
            )
            yield SmallCase(
                f"quantise_rows {kind} {dim}",
                lambda x, kind=kind: ops.quantise_rows(x, kind).wide(),
                lambda x, kind=kind: ops.quantise_rows_reference(x, kind).wide(),
                (x,),
                gradients=False,
                compile=dim == 1536,
            )
        yield SmallCase(
            f"eight_bit_linear {kind}",
            lambda x, w, kind=kind: ops.eight_bit_linear(
                ops.quantise_rows(x, kind), *_tensors(ops.quantise_rows(w, kind))
            ),
            lambda x, w, kind=kind: ops.eight_bit_linear_reference(
                ops.quantise_rows_reference(x, kind), *_tensors(ops.quantise_rows_reference(w, kind))
            ),
            (rand(40, 64), rand(48, 64)),
            gradients=False,
        )


def large(shape: TokenShape, rand: Rand) -> Iterator[LargeCase]:
    width = shape.heads * shape.dim
    x, scale, shift = rand(shape.tokens, width), rand(1, width), rand(1, width)
    yield LargeCase(
        "norm_modulate_eight_bit", lambda *t: _tensors(ops.norm_modulate_eight_bit(*t, "int8")), (x, scale, shift)
    )
    yield LargeCase("quantise_rows", lambda x: _tensors(ops.quantise_rows(x, "fp8")), (x,))


BENCH = Benchmark(TOKENS, cases, small, large)
