# SPDX-License-Identifier: Apache-2.0
"""audio_attention against SDPA with frames as batch, which is how official code avoids a mask,
and softmax written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, size
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops

SHAPES = TOKENS


def _frames(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frames become the batch: [B * F, H, tokens, D]."""
    frames = k.shape[0] * k.shape[1]
    split = q.reshape(frames, -1, *q.shape[2:])
    return split.transpose(1, 2), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*_frames(q, k, v)).transpose(1, 2).reshape(q.shape)


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    split, keys, values = _frames(q, k, v)
    scores = split @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (torch.softmax(scores.float(), dim=-1).to(q.dtype) @ values).transpose(1, 2).reshape(q.shape)


def cases(shape: TokenShape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    frames, height, width = shape.video
    tokens = frames * height * width

    def inputs() -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        q = torch.randn(1, tokens, shape.heads, shape.dim, **options)
        k, v = (torch.randn(1, frames, shape.audio, shape.heads, shape.dim, **options) for _ in range(2))
        return q, k, v

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
            ours=lambda q, k, v, out=None: ops.audio_attention(q, k, v, height * width, out=out),
            baselines={"eager": _eager, "sdpa": _sdpa},
            compiled=_eager,
        )
