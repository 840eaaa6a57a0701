# SPDX-License-Identifier: Apache-2.0
"""Rotary time in audio attention: turning keys alone equals turning queries and keys, by complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from talkingdit import ops


def turned(x: Tensor, times: Tensor) -> Tensor:
    """x [B, N, H, D] float64, token n turned by times[n]: as complex numbers, by hand."""
    dim = x.shape[-1]
    angle = times[:, None].double() * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[None, :, None]).flatten(-2)


def whole_sequence(q: Tensor, tokens: Tensor, values: Tensor, per_frame: int, window: int | None) -> Tensor:
    """The paper's form: video tokens attend to the clip's one sequence of audio tokens, both turned by their time.

    q [B, F S, H, D]; tokens, values [B, F A, H, D]; the time of a frame is the middle of its A tokens.
    """
    frames = q.shape[1] // per_frame
    each = tokens.shape[1] // frames
    frame = torch.arange(q.shape[1]) // per_frame
    q = turned(q, frame * each + (each - 1) / 2)
    k = turned(tokens, torch.arange(tokens.shape[1]))
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if window is not None:
        mask = (frame[:, None] - torch.arange(k.shape[1]) // each).abs() <= window
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, values)), attn_mask=mask)
    return out.transpose(1, 2)


def make(frames: int = 5, per_frame: int = 6, each: int = 4, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, frames * per_frame, 2, dim, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, frames * each, 2, dim, generator=g, dtype=torch.float64) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("window", [0, 1, 3, None])
def test_turned_keys_are_the_papers_attention_with_gradients(window: int | None) -> None:
    inputs = [x.requires_grad_() for x in make()]
    q, k, v = inputs
    heard = ops.heard_tokens(5, 4, window)
    lens = heard.lens.expand(2, -1)
    out = ops.audio_rope_attention(q, k[:, heard.tokens], v[:, heard.tokens], heard.positions, 6, kv_lens=lens)
    wanted = whole_sequence(*inputs, 6, window)
    torch.testing.assert_close(out, wanted)
    grad = torch.randn(out.shape, dtype=torch.float64)
    for got, want in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_a_shard_that_cuts_a_frame_is_a_part_of_the_whole_and_the_reference_agrees_from_any_start() -> None:
    q, k, v = make()
    heard = ops.heard_tokens(5, 4, 1)
    lens = heard.lens.expand(2, -1)
    k, v = k[:, heard.tokens], v[:, heard.tokens]
    whole = ops.audio_rope_attention(q, k, v, heard.positions, 6, kv_lens=lens)
    part = ops.audio_rope_attention(q[:, 7:20], k, v, heard.positions, 6, token_offset=7, kv_lens=lens)
    torch.testing.assert_close(part, whole[:, 7:20])
    for start in (0.0, 1234.5):
        other = ops.audio_rope_attention_reference(q, k, v, heard.positions, 6, kv_lens=lens, start=start)
        torch.testing.assert_close(other, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_turning_both_eagerly(dtype: torch.dtype) -> None:
    q, k, v = make(dim=64)
    exact = whole_sequence(q, k, v, 6, None)
    heard = ops.heard_tokens(5, 4)
    cast = [x.to(dtype) for x in (q, k, v)]
    mine = ops.audio_rope_attention(cast[0], cast[1][:, heard.tokens], cast[2][:, heard.tokens], heard.positions, 6)
    frame = torch.arange(30) // 6
    eager = torch.nn.functional.scaled_dot_product_attention(
        turned(cast[0].double(), frame * 4 + 1.5).to(dtype).transpose(1, 2),
        turned(cast[1].double(), torch.arange(20)).to(dtype).transpose(1, 2),
        cast[2].transpose(1, 2),
    ).transpose(1, 2)
    error, theirs = ((x.double() - exact).square().mean().sqrt() for x in (mine, eager))
    assert error <= 2 * theirs


def test_it_is_one_graph_with_a_layout() -> None:
    q, k, v = make()
    heard = ops.heard_tokens(5, 4, 0)
    k, v = k[:, heard.tokens], v[:, heard.tokens]
    layout = ops.audio_rope_layout(heard.positions, 32)
    compiled = torch.compile(ops.audio_rope_attention, fullgraph=True, backend="eager")
    wanted = ops.audio_rope_attention(q, k, v, heard.positions, 6)
    torch.testing.assert_close(compiled(q, k, v, layout, 6), wanted)


def test_what_does_not_fit_is_told() -> None:
    q, k, v = make()
    with pytest.raises(ValueError, match=r"positions must have shape \[F, A\] = \(5, 4\), got \(5, 3\)"):
        ops.audio_rope_attention(q, k.unflatten(1, (5, 4)), v.unflatten(1, (5, 4)), torch.zeros(5, 3), 6)
    with pytest.raises(ValueError, match="k must be"):
        ops.audio_rope_attention(q, k, v, torch.zeros(5, 4), 6)
    with pytest.raises(ValueError, match="window at least 0"):
        ops.heard_tokens(3, 4, -1)
