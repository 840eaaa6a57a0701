# SPDX-License-Identifier: Apache-2.0
"""rope3d of one tensor against real arithmetic, the same compiled, and complex128 as official Wan code rotates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, size
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops

SHAPES = TOKENS


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
