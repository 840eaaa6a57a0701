# SPDX-License-Identifier: Apache-2.0
"""audio_attention against SDPA with frames as batch, by every backend, flex_attention, and softmax written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import audio_baselines as others
from bench.harness import Case, size
from bench.shapes import AUDIO, TokenShape
from talkingdit import ops

SHAPES = AUDIO


def cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    frames, height, width = shape.video
    tokens = frames * height * width

    def inputs() -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        q = torch.randn(1, tokens, shape.heads, shape.dim, **options)
        k, v = (torch.randn(1, frames, shape.audio, shape.heads, shape.dim, **options) for _ in range(2))
        return q, k, v

    optional: dict[str, Callable[..., Any]] = {}
    fused: dict[str, Callable[..., Any]] = {}
    if device.type == "cuda":
        optional = {f"sdpa-{name}": others.sdpa_with(name) for name in others.BACKENDS}
        fused = {"flex": others.flex, "flex-blocks": others.flex_blocks(frames, height * width, shape.audio, device)}
    q, k, v = (size(t) for t in inputs())
    for direction, moved in (
        ("forward", 2 * q + k + v),
        ("backward", 3 * q + 2 * (k + v)),
    ):  # q, gradient, its gradient
        yield Case(
            "audio_attention",
            shape.name,
            tokens,
            dtype,
            direction,
            bytes=moved,
            inputs=inputs,
            ours=partial(_ours, per_frame=height * width),
            baselines={"eager": others.eager, "sdpa": others.sdpa},
            compiled=others.eager,
            optional=optional,
            fused=fused,
        )


def _ours(q: Tensor, k: Tensor, v: Tensor, per_frame: int, out: Tensor | None = None) -> Tensor:
    return ops.audio_attention(q, k, v, per_frame, out=out)
