# SPDX-License-Identifier: Apache-2.0
"""Attention in half precision with gradients on processors.

The backward of PyTorch's flash kernel is slow there in bfloat16 unless there are many tokens, even where the processor
multiplies it itself. Products of whole matrices, which fit for a few hundred tokens, are faster (docs/attention.md).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from talkingdit.nn.bfloat16 import multiplies_bfloat16

_FEWEST_SCORES = 1 << 16  # fewer are no work
_MOST_SCORES = 1 << 23  # 32 MiB in float32; half of it waits for the backward


def way(q: Tensor, k: Tensor) -> Literal["products", "kernel", "float32"]:
    """How q [B, N, H, D] and k [B, M, H, D] of 16 bits, on a processor, attend where gradients are recorded: by
    `attend`, by PyTorch's kernel, or by it in float32."""
    # A compiled graph has no place for a function with a backward of its own.
    if q.dtype != torch.bfloat16 or torch.compiler.is_compiling() or not multiplies_bfloat16(q.device):
        return "float32"
    batch, tokens, heads, _ = q.shape
    scores = batch * heads * tokens * k.shape[1]
    if scores < _FEWEST_SCORES:
        return "float32"
    return "products" if scores <= _MOST_SCORES else "kernel"


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
