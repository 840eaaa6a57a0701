# SPDX-License-Identifier: Apache-2.0
"""Attention whose queries, keys and values are all in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.nn import attention_backends, bfloat16_attention

Joint = tuple[Tensor, Tensor, Tensor]


class AttentionOptions(NamedTuple):
    """What attention is told besides q, k and v; the fields are those of `talkingdit.nn.attention.attention`."""

    mask: Tensor | None = None  # bool [B, keys]
    backend: str = "auto"
    segments: Sequence[int] | None = None
    joint: Joint | None = None


def attend(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, token_offset: int = 0
) -> Tensor | tuple[Tensor, Tensor]:
    """`talkingdit.nn.attention.attention` of keys that are all here.

    Args:
        token_offset: place of the first query in the sequence of the keys.
    """
    mask, backend, segments, joint = options
    if joint is not None:
        length = q.shape[1]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), joint, strict=True))
        out = scaled_dot_product(q, k, v, mask, backend)
        return out[:, :length], out[:, length:]
    if segments is None:
        return scaled_dot_product(q, k, v, mask, backend)
    parts = []
    for start, end in zip([0, *segments[:-1]], segments, strict=True):
        queries = slice(max(start - token_offset, 0), max(end - token_offset, 0))
        if q[:, queries].shape[1]:
            keys = None if mask is None else mask[:, start:end]
            parts.append(scaled_dot_product(q[:, queries], k[:, start:end], v[:, start:end], keys, backend))
    return torch.cat(parts, dim=1) if parts else scaled_dot_product(q, k, v, mask, backend)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """q [B, N, H, D], k and v [B, M, H, D], mask bool [B, M] -> [B, N, H, D]."""
    dtype = q.dtype
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    choice = attention_backends.choose(backend, q, mask is not None, gradients)
    if choice in attention_backends.LIBRARIES:
        with torch.autocast(q.device.type, enabled=False):
            return attention_backends.attend(choice, q, k, v)[0]
    if q.is_cpu and dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled():
        way = bfloat16_attention.way(q, k)
        if way == "products" and gradients and choice == "torch":
            with torch.autocast("cpu", enabled=False):
                return bfloat16_attention.attend(q, k, v, mask)
        if way != "kernel":
            q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[:, None, None, :]
    with torch.autocast(q.device.type, enabled=False), attention_backends.torch_kernels(choice):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).to(dtype)
