# SPDX-License-Identifier: Apache-2.0
"""audio_attention against SDPA with frames as batch, by every backend, flex_attention, and softmax written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import audio_baselines as others
from bench.cases import Benchmark, Case, LargeCase, Rand, SmallCase, size
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops

_S2V, *_OTHERS = TOKENS["cuda"]
SHAPES = {
    "cpu": TOKENS["cpu"],
    "cuda": [*(_S2V.with_audio(a) for a in (5, 32, 40, 16)), *(shape.with_audio(shape.audio) for shape in _OTHERS)],
    "quick": TOKENS["quick"],
}


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


def small(rand: Rand) -> Iterator[SmallCase]:
    for dim, audio, window, speakers in ((128, 5, 0, 0), (64, 40, 0, 0), (32, 7, 1, 2), (20, 3, 0, 0)):
        people = (speakers,) if speakers else ()
        q, k, v = rand(2, 130, 3, dim), rand(2, *people, 4, audio, 3, dim), rand(2, *people, 4, audio, 3, dim)
        weights = (rand(2, speakers, 130).sigmoid(),) if speakers else ()

        def run(op: Callable[..., Tensor], *t: Tensor, window: int = window) -> Tensor:
            return op(*t[:3], 35, token_offset=10, window=window, weights=t[3] if len(t) > 3 else None)

        yield SmallCase(
            f"audio_attention {dim} x {audio}, window {window}, speakers {speakers}",
            lambda *t, run=run: run(ops.audio_attention, *t),
            lambda *t, run=run: run(ops.audio_attention_reference, *t),
            (q, k, v, *weights),
            compile=dim == 128,
        )


def large(shape: TokenShape, rand: Rand) -> Iterator[LargeCase]:
    frames, height, width = shape.video
    keys = [rand(frames, 5, shape.heads, shape.dim) for _ in range(2)]
    q = rand(shape.tokens, shape.heads, shape.dim)
    yield LargeCase("audio_attention", lambda *t: ops.audio_attention(*t, height * width), (q, *keys))


BENCH = Benchmark(SHAPES, cases, small, large, early=True, headline="audio_attention")
