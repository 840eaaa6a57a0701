# SPDX-License-Identifier: Apache-2.0
"""Attention with gradients on processors that multiply bfloat16 themselves: PyTorch's flash kernel does not there.

Its backward is slower in bfloat16 than in float32. Products of whole matrices, which fit for sequences of a thousand
tokens or so, are two to three times faster than that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from talkingdit._native_loader import build_info

_FEWEST = 128  # queries and keys: calls of small products take longer than what they save
_MOST_SCORES = 1 << 24  # of a call: 64 MiB in float32, half of which waits for the backward


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster on this device than those of float32."""
    return device.type == "cuda" or (device.type == "cpu" and build_info()["cpu_isa"] == "avx512_bf16")


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether `attend` is what to do with q [B, N, H, D] and k [B, M, H, D] that need gradients."""
    if not q.is_cpu or q.dtype != torch.bfloat16 or not multiplies_bfloat16(q.device):
        return False
    batch, tokens, heads, _ = q.shape
    return min(tokens, k.shape[1]) >= _FEWEST and batch * heads * tokens * k.shape[1] <= _MOST_SCORES


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, scale D ** -0.5: scores and softmax in float32, weights and their gradients in bfloat16.

    Args:
        q: [B, N, H, D] bfloat16.
        k, v: [B, M, H, D] bfloat16.
        mask: bool [B, M], true where a key may be attended.

    Returns:
        [B, N, H, D] bfloat16. It can be differentiated once.
    """
    return _Attention.apply(q, k, v, mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.heads, ctx.scale = q.shape[2], q.shape[-1] ** -0.5
        q, k, v = _rows(q), _rows(k), _rows(v)
        if mask is None:
            scores = torch.bmm(q.float() * ctx.scale, k.float().mT)
        else:
            hidden = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf).repeat_interleave(ctx.heads, 0)
            scores = torch.baddbmm(hidden[:, None], q.float(), k.float().mT, alpha=ctx.scale)
        weights = torch.softmax(scores, -1, out=scores).bfloat16()
        ctx.save_for_backward(q, k, v, weights)
        return _tokens(weights @ v, ctx.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        grad = _rows(grad)
        grad_scores = torch._softmax_backward_data(grad @ v.mT, weights, -1, torch.bfloat16)
        grads = ((grad_scores @ k).mul_(ctx.scale), (grad_scores.mT @ q).mul_(ctx.scale), weights.mT @ grad)
        grad_q, grad_k, grad_v = (_tokens(x, ctx.heads) for x in grads)
        return grad_q, grad_k, grad_v, None


def _rows(x: Tensor) -> Tensor:
    """[B, N, H, D] -> [B * H, N, D]"""
    return x.transpose(1, 2).flatten(0, 1)


def _tokens(x: Tensor, heads: int) -> Tensor:
    """[B * H, N, D] -> [B, N, H, D]"""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)
