# SPDX-License-Identifier: Apache-2.0
"""A transformer block of the Wan family on the fused ops, over whatever attention and feed-forward it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.nn.accelerate.replacement import plain
from talkingdit.nn.layers import wide


class BlockModulation(NamedTuple):
    """Shift, scale and gate of the self-attention, then of the feed-forward, each [B, G, dim], and the G groups: ends
    of token ranges, tokens per group, or None for one group."""

    rows: Sequence[Tensor]
    groups: int | list[int] | None


def layer_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers will compute in when given float32 (float64) tensors."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wide(x.dtype)


def run_block(
    x: Tensor,
    modulation: BlockModulation,
    eps: tuple[float, float],
    norm: Callable[[Tensor], Tensor],
    self_attention: Callable[[Tensor], Tensor],
    cross_attention: Callable[[Tensor], Tensor],
    feed_forward: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Self-attention, cross-attention and feed-forward on the residual stream x [B, N, dim].

    Args:
        x: the stream; the result has its dtype.
        modulation: made from the timestep.
        eps: of the norms before self-attention and before feed-forward.
        norm: before cross-attention: a layer norm with weights, or what is called as it is, such as an identity.
        self_attention, cross_attention, feed_forward: from normed tokens [B, N, dim] to what is added to the stream.
        dtype: of what they are given.
    """
    (shift1, scale1, gate1, shift2, scale2, gate2), groups = modulation
    y = self_attention(ops.norm_modulate(x, scale1, shift1, groups, eps=eps[0], dtype=dtype))
    if not isinstance(norm, nn.LayerNorm) or not plain(norm):
        x = ops.gate_residual(x, y, gate1, groups)
        y = norm(x).to(dtype)
    else:
        # An affine norm is a modulated one with the same scale and shift everywhere.
        scale = norm.weight.to(wide(norm.weight.dtype))[None, None] - 1
        shift = torch.zeros_like(scale) if norm.bias is None else norm.bias[None, None]
        if groups == 1:
            x = ops.gate_residual(x, y, gate1, groups)
            y = ops.norm_modulate(x, scale, shift, eps=norm.eps, dtype=dtype)
        else:
            scale, shift = scale.expand_as(gate1), shift.expand_as(gate1)
            x, y = ops.gate_residual_norm_modulate(x, y, gate1, scale, shift, groups, eps=norm.eps, dtype=dtype)
    y = cross_attention(y)
    if groups == 1:
        x = x + y
        y = ops.norm_modulate(x, scale2, shift2, groups, eps=eps[1], dtype=dtype)
    else:
        one = torch.ones_like(gate1)
        x, y = ops.gate_residual_norm_modulate(x, y, one, scale2, shift2, groups, eps=eps[1], dtype=dtype)
    return ops.gate_residual(x, feed_forward(y), gate2, groups)
