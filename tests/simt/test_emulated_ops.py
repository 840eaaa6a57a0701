# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels without a GPU: compiled for the host, run thread by thread in three orders, between pages that trap,
on poisoned memory, against float64."""

from __future__ import annotations

import pytest
import torch
from conftest import Device
from torch import Tensor

from talkingdit import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Heads narrower and wider than a warp's share, a number of them that fills no warp, a dim (22) that vectors do not fit.
HEADS = [
    (3, (12, 10, 10), "half"),
    (5, (44, 42, 42), "interleaved"),
    (5, (44, 42, 42), "half"),
    (9, (4, 2, 2), "interleaved"),
    (2, (6, 8, 8), "interleaved"),
]


def rand(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def layout(split: tuple[int, int, int] = (12, 10, 10), pairing: str = "interleaved") -> ops.RopeLayout:
    """27 tokens: an anchor, a video of three frames, a pooled history."""
    segments = [
        ops.Segment([30], range(2), [0.5, 1.5]),
        ops.Segment(range(3), range(2), range(3)),
        ops.Segment([[-2, -1]], [0], range(5)),
    ]
    return ops.RopeLayout(segments, split=split, pairing=pairing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "split", "pairing"), HEADS)
def test_rope3d(device: Device, dtype: torch.dtype, heads: int, split: tuple[int, int, int], pairing: str) -> None:
    place = layout(split, pairing)
    x = rand(2, 20, heads, sum(split), dtype=dtype)
    device.compare(
        lambda x: ops.rope3d(x, place, token_offset=5), lambda x: ops.rope3d_reference(x, place, token_offset=5), [x]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["all_heads", "per_head"])
@pytest.mark.parametrize(("heads", "split", "pairing"), HEADS)
def test_qk_norm_rope3d(
    device: Device, dtype: torch.dtype, norm: str, heads: int, split: tuple[int, int, int], pairing: str
) -> None:
    place, dim = layout(split, pairing), sum(split)
    width = dim if norm == "per_head" else heads * dim
    inputs = [rand(2, 9, heads, dim, dtype=dtype), rand(2, 9, heads, dim, dtype=dtype)]
    inputs += [1 + rand(width, dtype=dtype), 1 + rand(width, dtype=dtype)]
    options = {"norm": norm, "token_offset": 11, "eps": 1e-5}
    device.compare(
        lambda *v: ops.qk_norm_rope3d(*v, place, **options),
        lambda *v: ops.qk_norm_rope3d_reference(*v, place, **options),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("speakers", [0, 2])
@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize(("audio", "dim"), [(5, 32), (7, 128), (3, 20)])
def test_audio_attention(device: Device, dtype: torch.dtype, speakers: int, window: int, audio: int, dim: int) -> None:
    people, per_frame = ((speakers,) if speakers else ()), 6
    q = rand(1, 15, 2, dim, dtype=dtype)
    k, v = (rand(1, *people, 4, audio, 2, dim, dtype=dtype) for _ in range(2))
    weights = [torch.rand(1, speakers, 15).to(dtype)] if speakers else []
    options = {"token_offset": 3, "window": window, "kv_lens": torch.randint(1, audio + 1, (1, *people, 4))}

    def run(op, q, k, v, weights=None):  # type: ignore[no-untyped-def]
        return op(q, k, v, per_frame, weights=weights, **options)

    device.compare(
        lambda *t: run(ops.audio_attention, *t), lambda *t: run(ops.audio_attention_reference, *t), [q, k, v, *weights]
    )


GROUPS = [(4, 4), ([3, 3, 20], 3), (None, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "count"), GROUPS, ids=str)
@pytest.mark.parametrize("dim", [64, 37, 520])
@pytest.mark.parametrize("which", ["norm", "gate", "both"])
def test_modulate(device: Device, dtype: torch.dtype, groups: object, count: int, dim: int, which: str) -> None:
    x, y = rand(2, 13, dim, dtype=dtype), rand(2, 13, dim, dtype=dtype)
    gate, scale, shift = (rand(2, count, dim, dtype=dtype) for _ in range(3))
    offset = 0 if groups is None else 2
    name, inputs = {
        "norm": ("norm_modulate", [x, scale, shift]),
        "gate": ("gate_residual", [x, y, gate]),
        "both": ("gate_residual_norm_modulate", [x, y, gate, scale, shift]),
    }[which]
    device.compare(
        lambda *v: getattr(ops, name)(*v, groups, token_offset=offset),
        lambda *v: getattr(ops, f"{name}_reference")(*v, groups, token_offset=offset),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(4, 6), (3, 5), (2, 8)])
def test_window_fusion(device: Device, dtype: torch.dtype, size: tuple[int, int]) -> None:
    windows, starts = rand(3, 2, 5, *size, dtype=dtype), [0, 3, 6]
    weights = torch.rand(3, 5, dtype=torch.float64) + 0.1
    device.compare(
        lambda w: ops.window_fusion(w, starts, weights, 9),
        lambda w: ops.window_fusion_reference(w, starts, weights, 9),
        [windows],
    )


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
def test_fused_window_step(device: Device, dtypes: tuple[torch.dtype, torch.dtype], size: tuple[int, int]) -> None:
    x, predictions = rand(2, 9, *size, dtype=dtypes[0]), [rand(3, 2, 5, *size, dtype=dtypes[1]) for _ in range(3)]
    weights, starts = torch.rand(3, 5, dtype=torch.float64) + 0.1, [0, 5, 7]  # the last one wraps
    coefficients = torch.randn(3, 4, dtype=torch.float64)
    weights[1, 2] = 0
    device.compare(
        lambda x, *p: ops.fused_window_step(x, list(p), coefficients, starts, weights),
        lambda x, *p: ops.fused_window_step_reference(x, list(p), coefficients, starts, weights),
        [x, *predictions],
    )
