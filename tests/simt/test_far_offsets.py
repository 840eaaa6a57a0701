# SPDX-License-Identifier: Apache-2.0
"""Views whose elements lie further apart than 32 bits count: between the rows that are used, memory is never touched.

What a 32-bit product of an index and a stride would reach is another page of the same mapping, which reads as zeros, or
no memory at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from emulated_device import TOLERANCE, Device
from torch import Tensor

from talkingdit import ops

FAR = (1 << 31) + (1 << 12)  # elements; wraps to a small positive number as a 32-bit integer does


def spread(device: Device, value: Tensor) -> Tensor:
    """The values in a view [B, N, ...] whose samples, and within them tokens, are FAR elements apart."""
    inner = value[0, 0].numel()
    strides = (FAR * value.shape[1], FAR, *value[0, 0].contiguous().stride())
    room = device.empty(FAR * (value.shape[0] * value.shape[1] - 1) + inner, dtype=value.dtype)
    return room.as_strided(value.shape, strides).copy_(value)


def check(device: Device, op: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    ours = op(*[spread(device, value) for value in inputs])
    truth = reference(*[value.double() for value in inputs])
    error = float((ours.double() - truth).norm() / truth.norm())
    assert error < TOLERANCE[ours.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rope3d(device: Device, dtype: torch.dtype) -> None:
    layout = ops.RopeLayout([ops.Segment(range(3), [0], [0])], split=(12, 10, 10))
    x = torch.randn(2, 3, 2, 32).to(dtype)

    def into_far_rows(x: Tensor) -> Tensor:
        return ops.rope3d(x, layout, out=spread(device, torch.zeros_like(x)))

    check(device, into_far_rows, lambda x: ops.rope3d_reference(x, layout), [x])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norm_modulate(device: Device, dtype: torch.dtype) -> None:
    inputs = [torch.randn(2, 4, 64).to(dtype), *(torch.randn(2, 2, 64).to(dtype) for _ in range(2))]
    check(device, lambda *t: ops.norm_modulate(*t, 2), lambda *t: ops.norm_modulate_reference(*t, 2), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_audio_attention(device: Device, dtype: torch.dtype) -> None:
    """bfloat16 goes through tensor cores, float32 through the general kernels."""
    inputs = [torch.randn(2, 6, 2, 64).to(dtype), *(torch.randn(2, 2, 5, 2, 64).to(dtype) for _ in range(2))]
    check(device, lambda *t: ops.audio_attention(*t, 3), lambda *t: ops.audio_attention_reference(*t, 3), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_audio_attention_gradients(device: Device, dtype: torch.dtype) -> None:
    inputs = [torch.randn(1, 6, 2, 64).to(dtype), *(torch.randn(1, 2, 5, 2, 64).to(dtype) for _ in range(2))]
    grad = torch.randn(1, 6, 2, 64).to(dtype)

    def gradients(op: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
        leaves = [value.requires_grad_() for value in tensors]
        return list(torch.autograd.grad(op(*leaves, 3), leaves, grad))

    ours = gradients(ops.audio_attention, [spread(device, value) for value in inputs], spread(device, grad))
    truth = gradients(ops.audio_attention_reference, [value.double() for value in inputs], grad.double())
    for found, expected in zip(ours, truth, strict=True):
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < 2 * TOLERANCE[dtype]


def test_frame_linear(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["talkingdit.ops.frame_linear"]
    monkeypatch.setattr(module, "native", device.module)
    monkeypatch.setattr(module, "used_for", lambda x: True)
    inputs = [torch.randn(2, 4, 10).bfloat16(), torch.randn(2, 2, 10, 24).bfloat16(), torch.randn(2, 4, 24).bfloat16()]

    def op(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return ops.frame_linear(x, weight, 2, residual=residual, out=residual)

    check(device, op, lambda x, w, r: ops.frame_linear_reference(x, w, 2, residual=r), inputs)
