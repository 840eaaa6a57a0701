# SPDX-License-Identifier: Apache-2.0
"""The repeated block of the Wan transformers and the head behind the last one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.families.wan_s2v.conditions import KeyValue
from talkingdit.families.wan_s2v.sequence import SequenceShard
from talkingdit.nn.attention import attention
from talkingdit.nn.audio_cross_attention import CrossAttention
from talkingdit.nn.eight_bit import NormOptions, gate_residual_norm_modulate, norm_modulate
from talkingdit.nn.feed_forward import feed_forward, overwrites
from talkingdit.nn.layers import Float32Linear, GeluTanh, LayerNorm, RMSNorm, lend
from talkingdit.ops import EightBitRows, RopeLayout

Groups = int | list[int]  # tokens per group, or where groups end


@dataclass(frozen=True)
class BlockInputs:
    """What all blocks of a step are given besides tensors with gradients, which are arguments of their own.

    Hooks of sharding look for those among the arguments of a block, and not in all versions of torch inside others.
    """

    groups: Groups  # of tokens that are modulated alike
    layout: RopeLayout  # places of the tokens of the whole sequence
    text_mask: Tensor | None = None  # bool [B, L]
    key_mask: Tensor | None = None  # bool [B, N]
    backend: str = "auto"  # see `talkingdit.nn.attention.attention`
    inplace: bool = False  # the residual stream may be overwritten. Where gradients are recorded it is not.
    shard: SequenceShard | None = None  # None: all tokens, of a sequence that is not packed
    gelu: str = "auto"  # kernel of the feed-forward's first product, see `talkingdit.ops.linear_gelu`

    @property
    def token_offset(self) -> int:
        """Place of the first token in the whole sequence."""
        return 0 if self.shard is None else self.shard.begin


class SelfAttention(nn.Module):
    """Full attention with q and k RMS-normalised over all heads and rotated by their places."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def forward(self, x: Tensor | EightBitRows, inputs: BlockInputs) -> Tensor:
        """x [B, N, dim], the tokens of a shard -> [B, N, dim]."""
        q, k, v = (linear(x).unflatten(-1, (self.num_heads, -1)) for linear in (self.q, self.k, self.v))
        out = (q, k) if overwrites() else None
        weights = lend(self.norm_q)[0], lend(self.norm_k)[0]
        q, k = ops.qk_norm_rope3d(
            q, k, *weights, inputs.layout, eps=self.eps, token_offset=inputs.token_offset, out=out
        )
        mask, backend, shard = inputs.key_mask, inputs.backend, inputs.shard
        if shard is None:
            y = attention(q, k, v, mask=mask, backend=backend).flatten(2)
        else:
            y = attention(
                q, k, v, mask=mask, backend=backend, context=shard.context, tokens=shard.tokens, segments=shard.segments
            ).flatten(2)
        del q, k, v, out  # before the output projection asks for memory
        return self.o(y)


class TextCrossAttention(CrossAttention):
    """Attention of every token to the text; of a packed sequence to that of its clip."""

    def forward(
        self, x: Tensor | EightBitRows, text: Tensor, inputs: BlockInputs, key_value: KeyValue | None = None
    ) -> Tensor:
        """x [B, N, dim], text [B, L, dim] (or its `key_value`) -> [B, N, dim]; x [1, N, dim] if it is packed."""
        key_value = self.key_value(text) if key_value is None else key_value
        return self.o(attend_clips(self.query(x), key_value, inputs, inputs.text_mask))


def attend_clips(q: Tensor, key_value: KeyValue, inputs: BlockInputs, mask: Tensor | None = None) -> Tensor:
    """Attention of queries q [B, N, H, D] to k, v [B, L, H, D], of a packed sequence to those of their clip.

    Args:
        mask: bool [B, L].

    Returns:
        [B, N, H * D]; for a packed sequence B is 1 here, and the number of its local clips in k, v and the mask.
    """
    (k, v), backend, shard = key_value, inputs.backend, inputs.shard
    if shard is None or not shard.packed:
        return attention(q, k, v, mask=mask, backend=backend).flatten(2)
    parts = []
    for i, (begin, end) in enumerate(shard.clip_ranges):
        one = slice(i, i + 1)
        clip_mask = None if mask is None else mask[one]
        parts.append(attention(q[:, begin:end], k[one], v[one], mask=clip_mask, backend=backend))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(2)


class WanBlock(nn.Module):
    """Self-attention, text cross-attention and feed-forward, the first and last modulated by the timestep.

    Args:
        dim, ffn_dim, num_heads, eps: as of the model.
        cross_attn: in the place of attention to the text alone, see `attend_context`.
    """

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, cross_attn: nn.Module | None = None):
        super().__init__()
        self.eps = eps
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = TextCrossAttention(dim, num_heads, eps) if cross_attn is None else cross_attn
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), GeluTanh(), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim).mul_(dim**-0.5))

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, inputs: BlockInputs, text_kv: KeyValue | None = None, *more: Any
    ) -> Tensor:
        """One block on the residual stream.

        Args:
            x: [B, N, dim], the tokens of this process.
            time: [B, G, 6, dim] float32, modulation of each group of tokens.
            text: [B, L, dim]; linear layers compute in its dtype.
            text_kv: k and v of the text for this block, where they were made beforehand.
            more: further context of `attend_context`.
        """
        dtype, groups, begin = text.dtype, inputs.groups, inputs.token_offset
        # Hooks around a block, such as caches of steps, may look at what it was given.
        inplace = inputs.inplace and overwrites() and not hasattr(self, "_diffusers_hook")
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.to(time.dtype)[:, None] + time).unbind(2)
        how = NormOptions(groups, self.eps, begin, dtype)
        y: Any = norm_modulate(self.self_attn.q, x, scale1, shift1, how)
        y = self.self_attn(y, inputs)
        # An affine norm is a modulated one with the same scale and shift everywhere.
        weight, bias = lend(self.norm3)
        scale, shift = (weight - 1).expand_as(gate1), bias.expand_as(gate1)
        x, y = gate_residual_norm_modulate(self._context_query(), x, y, gate1, scale, shift, how, inplace)
        y = self.attend_context(y, text, inputs, text_kv, *more)
        one = torch.ones_like(gate1)
        x, y = gate_residual_norm_modulate(self.ffn[0], x, y, one, scale2, shift2, how, inplace)
        y = feed_forward(self.ffn, y, inputs.gelu)
        return ops.gate_residual(x, y, gate2, groups, begin, out=x if inplace else None)

    def attend_context(self, y: Tensor, text: Tensor, inputs: BlockInputs, text_kv: KeyValue | None) -> Tensor:
        """What attention to text, and in other models to more, adds: normalised y [B, N, dim] -> [B, N, dim]."""
        return self.cross_attn(y, text, inputs, text_kv)

    def _context_query(self) -> Any:
        """The one layer that multiplies what `attend_context` is given; None in blocks that give it to more."""
        return self.cross_attn.q if type(self).attend_context is WanBlock.attend_context else None


class Head(nn.Module):
    """Last modulated norm and the projection to latent patches, in float32."""

    def __init__(self, dim: int, out_channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.head = Float32Linear(dim, out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim).mul_(dim**-0.5))

    def forward(self, x: Tensor, time: Tensor, groups: Groups, token_offset: int = 0) -> Tensor:
        """x [B, N, dim], time [B, G, dim] -> patches [B, N, out_channels].

        N = F * S noisy tokens, or those from `token_offset` on.
        """
        shift, scale = (self.modulation.to(time.dtype)[:, None] + time[:, :, None]).unbind(2)
        return self.head(ops.norm_modulate(x, scale, shift, groups, self.eps, token_offset))
