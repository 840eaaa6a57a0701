# SPDX-License-Identifier: Apache-2.0
"""One small case per CUDA kernel: the op, its reference, and inputs that reach whole vectors as well as their rest.
And large ones, whose last element lies beyond 2^31."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talkingdit import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SmallCase:
    """``op(*inputs)`` must give what ``reference(*inputs)`` gives in float64, gradients of all inputs included."""

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple[Tensor, ...]


def _layout(dim: int, pairing: str) -> ops.RopeLayout:
    other = 2 * (dim // 6)
    segments = [ops.Segment(range(3), range(5), range(7)), ops.Segment([30], range(5), range(7))]
    return ops.RopeLayout(segments, split=(dim - 2 * other, other, other), pairing=pairing)


def _rope(rand: Callable[..., Tensor]) -> Iterator[SmallCase]:
    for dim, pairing in ((128, "interleaved"), (64, "half"), (22, "interleaved")):
        layout = _layout(dim, pairing)
        yield SmallCase(
            f"rope3d {dim} {pairing}",
            lambda x, at=layout: ops.rope3d(x, at, token_offset=9),
            lambda x, at=layout: ops.rope3d_reference(x, at, token_offset=9),
            (rand(2, 101, 5, dim),),
        )
        for norm, width in (("all_heads", 5 * dim), ("per_head", dim)):
            yield SmallCase(
                f"qk_norm_rope3d {dim} {pairing} {norm}",
                lambda *v, at=layout, norm=norm: ops.qk_norm_rope3d(*v, at, norm=norm),
                lambda *v, at=layout, norm=norm: ops.qk_norm_rope3d_reference(*v, at, norm=norm),
                (rand(2, 101, 5, dim), rand(2, 101, 5, dim), rand(width), rand(width)),
            )


def _modulate(rand: Callable[..., Tensor]) -> Iterator[SmallCase]:
    groups = [20, 20, 101]
    for dim in (1536, 37):
        x, y = rand(2, 90, dim), rand(2, 90, dim)
        gate, scale, shift = rand(2, 3, dim), rand(2, 3, dim), rand(2, 3, dim)
        for name, inputs in {
            "norm_modulate": (x, scale, shift),
            "gate_residual": (x, y, gate),
            "gate_residual_norm_modulate": (x, y, gate, scale, shift),
        }.items():
            yield SmallCase(
                f"{name} {dim}",
                lambda *v, name=name: getattr(ops, name)(*v, groups, token_offset=7),
                lambda *v, name=name: getattr(ops, f"{name}_reference")(*v, groups, token_offset=7),
                inputs,
            )


def _attention(rand: Callable[..., Tensor]) -> Iterator[SmallCase]:
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
        )


def _fusion(rand: Callable[..., Tensor]) -> Iterator[SmallCase]:
    starts, weights = [0, 3, 7], torch.rand(3, 5, dtype=torch.float64) + 0.1
    coefficients = torch.rand(3, 3, dtype=torch.float64)
    for size in ((24, 40), (5, 7)):
        windows, x = rand(3, 4, 5, *size), rand(4, 12, *size)
        yield SmallCase(
            f"window_fusion {size}",
            lambda w: ops.window_fusion(w, starts, weights, 12),
            lambda w: ops.window_fusion_reference(w, starts, weights, 12),
            (windows,),
        )
        yield SmallCase(
            f"fused_window_step {size}",
            lambda x, *p: ops.fused_window_step(x, list(p), coefficients, starts, weights),
            lambda x, *p: ops.fused_window_step_reference(x, list(p), coefficients, starts, weights),
            (x, windows, rand(3, 4, 5, *size)),
        )


def _framepack(rand: Callable[..., Tensor]) -> Iterator[SmallCase]:
    def run(op: Callable[..., Tensor], latents: Tensor, *weights: Tensor) -> Tensor:
        kernels, frames = [(1, 2, 2), (1, 4, 4), (4, 8, 8)], [[18], [16, 17], range(16)]
        buckets = [ops.Bucket(f, k, w) for f, k, w in zip(frames, kernels, weights, strict=True)]
        return op(latents, buckets, padding="replicate")

    weights = [rand(64, 16, *kernel) for kernel in ((1, 2, 2), (1, 4, 4), (4, 8, 8))]
    yield SmallCase(
        "framepack",
        lambda *v: run(ops.framepack, *v),
        lambda *v: run(ops.framepack_reference, *v),
        (rand(1, 16, 19, 22, 30), *weights),
    )


def small_cases(dtype: torch.dtype, device: torch.device) -> Iterator[SmallCase]:
    """Fresh inputs every time; the same ones for the same seed."""

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for group in (_rope, _modulate, _attention, _fusion, _framepack):
        yield from group(rand)


def large_cases(
    device: torch.device, tiny: bool = False
) -> Iterator[tuple[str, Callable[..., Any], tuple[Tensor, ...]]]:
    """Name, op and bfloat16 inputs [6, 80,000 tokens, 40 heads, 128]: 2.5e9 elements, each sample on its own."""
    batch, frames, height, width, heads, dim = (2, 3, 4, 5, 2, 32) if tiny else (6, 20, 50, 80, 40, 128)
    per_frame, tokens = height * width, frames * height * width
    segments = [ops.Segment(range(frames), range(height), range(width))]
    layout = ops.RopeLayout(segments, split=(dim - 4 * (dim // 6), 2 * (dim // 6), 2 * (dim // 6)))

    def rand(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=torch.bfloat16)

    x = rand(tokens, heads, dim)
    yield "rope3d", lambda x: ops.rope3d(x, layout), (x,)
    weight = torch.rand(heads * dim, device=device, dtype=torch.bfloat16) + 0.5
    yield "qk_norm_rope3d", lambda q: ops.qk_norm_rope3d(q, q, weight, weight, layout)[0], (x,)
    keys = rand(frames, 5, heads, dim), rand(frames, 5, heads, dim)
    yield "audio_attention", lambda q, k, v: ops.audio_attention(q, k, v, per_frame), (x, *keys)
    shift, scale = rand(1, heads * dim), rand(1, heads * dim)
    yield "norm_modulate", lambda x, a, b: ops.norm_modulate(x, a, b), (x.flatten(2), scale, shift)
    yield "gate_residual", lambda x, gate: ops.gate_residual(x, x, gate), (x.flatten(2), scale)
