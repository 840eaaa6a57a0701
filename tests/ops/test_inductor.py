# SPDX-License-Identifier: Apache-2.0
"""Every op compiles with torch.compile's default backend into one graph, forward and backward, to the same numbers.

The other tests of compilation stop before code is generated (backend "aot_eager"); here it is, and inductor trusts what
an op's fake says about sizes and strides of results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from talkingdit import ops

FRAMES, HEIGHT, WIDTH, HEADS, DIM = 2, 2, 3, 2, 16
TOKENS = FRAMES * HEIGHT * WIDTH


def check_compiles(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
    torch._dynamo.reset()
    found = []
    for f in (function, torch.compile(function, fullgraph=True, backend="inductor")):
        leaves = [value.clone().requires_grad_() for value in inputs]
        results = f(*leaves)
        grads = torch.autograd.grad(results, leaves, [torch.ones_like(result) for result in results])
        found.append([*results, *grads])
    for expected, got in zip(*found, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_token_ops_compile_with_inductor() -> None:
    layout = ops.RopeLayout([ops.Segment(range(FRAMES), range(HEIGHT), range(WIDTH))], split=(8, 4, 4))

    def block(x: Tensor, audio: Tensor, weight: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
        scale, shift, gate = modulation.unbind(0)
        h = ops.norm_modulate(x, scale, shift, TOKENS // 2)
        q, k = ops.qk_norm_rope3d(h.unflatten(2, (HEADS, DIM)), -x.unflatten(2, (HEADS, DIM)), weight, weight, layout)
        attended = ops.audio_attention(q * k, audio, ops.rope3d(audio.flatten(1, 2), audio_layout).view_as(audio), 6)
        x, h = ops.gate_residual_norm_modulate(x, attended.flatten(2), gate, scale, shift, TOKENS // 2)
        return ops.gate_residual(x, h, gate, TOKENS // 2), k

    audio_layout = ops.RopeLayout([ops.Segment(range(4), range(1), range(1))], split=(16, 0, 0))
    shapes = ((1, TOKENS, HEADS * DIM), (1, FRAMES, 2, HEADS, DIM), (HEADS * DIM,), (3, 1, 2, HEADS * DIM))
    check_compiles(block, [torch.randn(shape) for shape in shapes])


@pytest.mark.slow
def test_latent_ops_compile_with_inductor() -> None:
    starts, weights = torch.tensor([0, 2]), torch.rand(2, 3) + 0.5

    def sample(x: Tensor, windows: Tensor, patches: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        fused = ops.window_fusion(windows, starts, weights, 5)
        stepped = ops.fused_window_step(x + fused, [windows, windows.cos()], (1.0, 0.3, -0.2), starts, weights)
        buckets = [ops.Bucket([4], (1, 2, 2), patches, bias), ops.Bucket(range(4), (2, 4, 4), patches_coarse, None)]
        return stepped, ops.framepack(stepped[None], buckets)

    patches_coarse = torch.randn(3, 2, 2, 4, 4)
    shapes = ((2, 5, 4, 6), (2, 2, 3, 4, 6), (3, 2, 1, 2, 2), (3,))
    check_compiles(sample, [torch.randn(shape) for shape in shapes])
