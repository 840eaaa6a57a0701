# SPDX-License-Identifier: Apache-2.0
"""frame_linear, the output side of an absorbed audio cross-attention, against a batched product and its epilogue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, size
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops

SHAPES = TOKENS


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
