# SPDX-License-Identifier: Apache-2.0
"""norm_modulate, gate_residual and both in one pass, with two ranges of tokens against official Wan-S2V code
(eager): float32, range by range, then concatenated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Benchmark, Case, LargeCase, Rand, SmallCase, size
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops


def _norm_modulate(ends: list[int]) -> Callable[..., Tensor]:
    def run(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normal = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
        parts, begin = [], 0
        for i, end in enumerate(ends):
            parts.append(normal[:, begin:end] * (1 + scale[:, i : i + 1]) + shift[:, i : i + 1])
            begin = end
        return torch.cat(parts, dim=1).to(x.dtype)

    return run


def _gate_residual(ends: list[int]) -> Callable[..., Tensor]:
    def run(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        parts, begin = [], 0
        for i, end in enumerate(ends):
            parts.append(y[:, begin:end].float() * gate[:, i : i + 1])
            begin = end
        return (x.float() + torch.cat(parts, dim=1)).to(x.dtype)

    return run


def _both(ends: list[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    add, norm = _gate_residual(ends), _norm_modulate(ends)

    def run(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        residual = add(x, y, gate)
        return residual, norm(residual, scale, shift)

    return run


def cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    width, ends = shape.heads * shape.dim, shape.ends

    def rows() -> Tensor:
        return torch.randn(1, shape.tokens, width, device=device, dtype=dtype)

    def modulation() -> Tensor:
        return torch.randn(1, len(ends), width, device=device)

    stream = size(rows())
    common: dict[str, Any] = {"shape": shape.name, "tokens": shape.tokens, "dtype": dtype}
    for direction in ("forward", "backward"):
        yield Case(
            "norm_modulate",
            **common,
            direction=direction,
            bytes=(2 if direction == "forward" else 3) * stream,
            inputs=lambda: (rows(), modulation(), modulation()),
            ours=lambda x, scale, shift, out=None: ops.norm_modulate(x, scale, shift, ends, out=out),
            baselines={"eager": _norm_modulate(ends)},
            compiled=_norm_modulate(ends),
        )
        yield Case(
            "gate_residual",
            **common,
            direction=direction,
            bytes=3 * stream,  # forward: x and y in, result out; backward: gradient and y in, gradient of y out
            inputs=lambda: (rows(), rows(), modulation()),
            ours=lambda x, y, gate, out=None: ops.gate_residual(x, y, gate, ends, out=out),
            baselines={"eager": _gate_residual(ends)},
            compiled=_gate_residual(ends),
        )
        yield Case(
            "gate_residual_norm_modulate",
            **common,
            direction=direction,
            # forward: x and y in, both results out; backward: their gradients, y and the residual in, two gradients out
            bytes=(4 if direction == "forward" else 6) * stream,
            inputs=lambda: (rows(), rows(), modulation(), modulation(), modulation()),
            ours=lambda *given, out=None: ops.gate_residual_norm_modulate(*given, ends, out=out),
            baselines={"eager": _both(ends)},
            compiled=_both(ends),
        )


def small(rand: Rand) -> Iterator[SmallCase]:
    groups = [20, 20, 101]
    for dim in (1536, 37):
        x, y = rand(2, 90, dim), rand(2, 90, dim)
        gate, scale, shift = rand(2, 3, dim), rand(2, 3, dim), rand(2, 3, dim)
        yield SmallCase(
            f"norm_modulate {dim}",
            lambda *v: ops.norm_modulate(*v, groups, token_offset=7),
            lambda *v: ops.norm_modulate_reference(*v, groups, token_offset=7),
            (x, scale, shift),
            compile=dim == 1536,
        )
        yield SmallCase(
            f"gate_residual {dim}",
            lambda *v: ops.gate_residual(*v, groups, token_offset=7),
            lambda *v: ops.gate_residual_reference(*v, groups, token_offset=7),
            (x, y, gate),
        )
        yield SmallCase(
            f"gate_residual_norm_modulate {dim}",
            lambda *v: ops.gate_residual_norm_modulate(*v, groups, token_offset=7),
            lambda *v: ops.gate_residual_norm_modulate_reference(*v, groups, token_offset=7),
            (x, y, gate, scale, shift),
        )


def large(shape: TokenShape, rand: Rand) -> Iterator[LargeCase]:
    width = shape.heads * shape.dim
    x, scale, shift = rand(shape.tokens, width), rand(1, width), rand(1, width)
    yield LargeCase("norm_modulate", lambda *t: ops.norm_modulate(*t), (x, scale, shift))
    yield LargeCase("gate_residual", lambda x, gate: ops.gate_residual(x, x, gate), (x, scale))


BENCH = Benchmark(TOKENS, cases, small, large, early=True, headline="gate_residual_norm_modulate")
