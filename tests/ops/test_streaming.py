# SPDX-License-Identifier: Apache-2.0
"""Results larger than the last cache are written past the caches; they must be those of the ordinary way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from talkingdit import ops
from talkingdit._native_loader import native

HEADS, DIM, PER_FRAME = 4, 64, 512
DTYPES = (torch.float32, torch.bfloat16)


def beyond_the_caches(row: int) -> int:
    """A few more rows of so many bytes than results can have that are written the ordinary way."""
    threshold = native.stream_threshold()
    if threshold > 128 << 20:
        pytest.skip(f"results would need more than {threshold >> 20} MiB on this machine")
    return threshold // row + 7


def halves(tokens: int) -> list[tuple[int, slice]]:
    """Shards of the tokens that are small enough for ordinary stores, with their offsets."""
    middle = tokens // 2 + 3
    return [(0, slice(0, middle)), (middle, slice(middle, tokens))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results_of_token_ops_equal_those_of_their_shards(dtype: torch.dtype) -> None:
    tokens = beyond_the_caches(HEADS * DIM * dtype.itemsize)
    x = torch.randn(1, tokens, HEADS, DIM).to(dtype)
    frames = -(-tokens // PER_FRAME)
    layout = ops.RopeLayout([ops.Segment(range(frames), range(1), range(PER_FRAME))], split=(24, 20, 20))
    k, v = torch.randn(2, 1, frames, 3, HEADS, DIM).to(dtype).unbind(0)
    modulation = torch.randn(1, 2, HEADS * DIM)
    weight = torch.rand(HEADS * DIM)
    ends = [tokens // 3, tokens]
    functions = {
        "rope3d": lambda x, at: ops.rope3d(x, layout, token_offset=at),
        "qk_norm_rope3d": lambda x, at: ops.qk_norm_rope3d(x, -x, weight, weight, layout, token_offset=at)[1],
        "audio_attention": lambda x, at: ops.audio_attention(x, k, v, PER_FRAME, token_offset=at),
        "norm_modulate": lambda x, at: ops.norm_modulate(x.flatten(2), modulation, modulation, ends, token_offset=at),
        "gate_residual": lambda x, at: ops.gate_residual(x.flatten(2), x.flatten(2), modulation, ends, at),
    }
    for name, function in functions.items():
        whole = function(x, 0)
        for at, part in halves(tokens):
            assert torch.equal(whole[:, part], function(x[:, part], at)), name

    def gradient(name: str, x: Tensor, at: int) -> Tensor:
        leaf = x.detach().requires_grad_()
        result = functions[name](leaf, at)
        return torch.autograd.grad(result, leaf, result.detach())[0]

    for name in ("rope3d", "qk_norm_rope3d", "norm_modulate", "gate_residual"):
        whole = gradient(name, x, 0)
        for at, part in halves(tokens):
            assert torch.equal(whole[:, part], gradient(name, x[:, part], at)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [48, 80])
def test_large_results_whose_rows_begin_within_a_line_are_right(dtype: torch.dtype, dim: int) -> None:
    """Stores past the caches must be aligned to a line; rows of these lengths are not."""
    tokens = beyond_the_caches(dim * dtype.itemsize) // PER_FRAME * PER_FRAME + PER_FRAME
    x = torch.randn(1, tokens, dim).to(dtype).requires_grad_()
    gate, scale, shift = torch.randn(3, 1, 1, dim)
    layout = ops.RopeLayout([ops.Segment(range(tokens), range(1), range(1))], split=(dim - 32, 16, 16))
    k, v = torch.randn(2, 1, tokens // PER_FRAME, 3, 1, dim).to(dtype).unbind(0)
    functions = {
        "norm_modulate": lambda x, at: ops.norm_modulate(x, scale, shift, tokens, token_offset=at),
        "both": lambda x, at: ops.gate_residual_norm_modulate(x, x, gate, scale, shift, tokens, token_offset=at)[1],
        "audio_attention": lambda x, at: ops.audio_attention(x.unsqueeze(2), k, v, PER_FRAME, token_offset=at),
        "rope3d": lambda x, at: ops.rope3d(x.unsqueeze(2), layout, token_offset=at),
        "qk_norm_rope3d": lambda x, at: ops.qk_norm_rope3d(
            x.unsqueeze(2), -x.unsqueeze(2), gate.flatten(), gate.flatten(), layout, token_offset=at
        )[0],
    }
    for name, function in functions.items():
        whole = function(x, 0)
        (gradient,) = torch.autograd.grad(whole, x, whole.detach())
        for at, part in halves(tokens):
            leaf = x.detach()[:, part].requires_grad_()
            result = function(leaf, at)
            assert torch.equal(whole[:, part], result), name
            assert torch.equal(gradient[:, part], torch.autograd.grad(result, leaf, result.detach())[0]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_fused_video_equals_its_channels_fused_alone(dtype: torch.dtype) -> None:
    channels, height, width = 16, 24, 12  # a row of a plane is no whole number of registers
    length = beyond_the_caches(channels * height * width * dtype.itemsize)
    windows = torch.randn(2, channels, length - length // 4, height, width).to(dtype)
    starts, weights = [0, length // 4], torch.rand(2, windows.shape[2]) + 0.5
    x = torch.randn(channels, length, height, width).to(dtype)

    def fuse(x: Tensor, windows: Tensor) -> list[Tensor]:
        step = ops.fused_window_step(x, [windows, -2 * windows], (1.0, 0.5, 0.25), starts, weights)
        into_itself = x.clone()
        ops.fused_window_step(into_itself, [windows, -2 * windows], (1.0, 0.5, 0.25), starts, weights, out=into_itself)
        return [ops.window_fusion(windows, starts, weights, length), step, into_itself]

    whole = fuse(x, windows)
    assert torch.equal(whole[1], whole[2])
    for part in (slice(0, channels // 2), slice(channels // 2, channels)):
        for got, expected in zip(whole, fuse(x[part], windows[:, part]), strict=True):
            assert torch.equal(got[part], expected)
