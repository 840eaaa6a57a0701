# SPDX-License-Identifier: Apache-2.0
"""Plain stand-ins for ComfyUI's Wan classes: the same attributes, signatures and arithmetic, written from their
description. Blocks only: what is before and after them is left as it is.

What differs from the official classes: everything is computed in the dtype of the stream; rotations come as matrices,
a 2 x 2 for every token and pair; norms may change their weights when they are called.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def optimized_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, transformer_options: Any) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rotations(tokens: int, pairs: int) -> Tensor:
    """[1, N, 1, pairs, 2, 2]"""
    angle = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(pairs) / pairs)
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1)
    return rows.unflatten(-1, (2, 2))[None, :, None]


def apply_rope1(x: Tensor, freqs: Tensor) -> Tensor:
    return (freqs @ x.to(freqs.dtype).unflatten(-1, (-1, 2))[..., None]).flatten(-3).type_as(x)


class LayerNorm(nn.LayerNorm):
    """`weight_function` is what ComfyUI hangs there for a LoRA on weights that stay where they are."""

    weight_function: Any = ()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        for change in self.weight_function:
            weight = change(weight)
        return F.layer_norm(x, self.normalized_shape, weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    weight_function: Any = ()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        for change in self.weight_function:
            weight = change(weight)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class WanSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = RMSNorm(dim, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, freqs: Tensor, transformer_options: Any = {}) -> Tensor:  # noqa: B006 as theirs
        shape = (self.num_heads, self.head_dim)
        q, k = (
            apply_rope1(norm(layer(x)).unflatten(-1, shape), freqs).flatten(2)
            for layer, norm in ((self.q, self.norm_q), (self.k, self.norm_k))
        )
        y = optimized_attention(q, k, self.v(x), self.num_heads, transformer_options=transformer_options)
        for patch in transformer_options.get("patches", {}).get("attn1_patch", []):
            y = patch({"x": y})
        return self.o(y)


class WanCrossAttention(WanSelfAttention):
    def forward(self, x: Tensor, context: Tensor, transformer_options: Any = {}, **kwargs: Any) -> Tensor:  # type: ignore[override]  # noqa: B006
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        return self.o(optimized_attention(q, k, v, self.num_heads, transformer_options=transformer_options))


def over_tokens(rows: Tensor, tokens: int) -> Tensor:
    """Rows [B, G, dim] for G parts of equal length, of which the last may be cut off."""
    return rows if rows.shape[1] == 1 else rows.repeat_interleave(-(-tokens // rows.shape[1]), dim=1)[:, :tokens]


class WanAttentionBlock(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, num_heads: int, qk_norm: bool = True, cross_attn_norm: bool = True):
        super().__init__()
        self.norm1 = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.self_attn = WanSelfAttention(dim, num_heads, qk_norm)
        self.norm3 = LayerNorm(dim, 1e-6) if cross_attn_norm else nn.Identity()
        self.cross_attn = WanCrossAttention(dim, num_heads, qk_norm)
        self.norm2 = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_img_len: int | None = 257,
        transformer_options: Any = {},  # noqa: B006
    ) -> Tensor:
        table = self.modulation.to(x.dtype)
        rows = (table + e).chunk(6, dim=1) if e.dim() == 3 else (table[None] + e).unbind(2)
        shift1, scale1, gate1, shift2, scale2, gate2 = (over_tokens(row, x.shape[1]) for row in rows)
        x = x + gate1 * self.self_attn(shift1 + self.norm1(x) * (1 + scale1), freqs, transformer_options)
        x = x + self.cross_attn(self.norm3(x), context, transformer_options=transformer_options)
        for patch in transformer_options.get("patches", {}).get("attn2_patch", []):
            x = patch({"x": x})
        return x + gate2 * self.ffn(shift2 + self.norm2(x) * (1 + scale2))


class VaceWanAttentionBlock(WanAttentionBlock):
    def __init__(self, *sizes: int, block_id: int = 0):
        super().__init__(*sizes)
        self.block_id = block_id
        if block_id == 0:
            self.before_proj = nn.Linear(sizes[0], sizes[0])
        self.after_proj = nn.Linear(sizes[0], sizes[0])

    def forward(self, c: Tensor, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        c = super().forward(self.before_proj(c) + x if self.block_id == 0 else c, **kwargs)
        return self.after_proj(c), c


class AudioBlock(WanAttentionBlock):
    """A block with more in it, as that of HuMo."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        e: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_img_len: int | None = 257,
        audio: Tensor | None = None,
        transformer_options: Any = {},  # noqa: B006
    ) -> Tensor:
        return super().forward(x, e, freqs, context, context_img_len, transformer_options) + (audio or 0)


class WanModel(nn.Module):
    """Tokens x [B, N, dim] -> [B, N, dim], through blocks and a branch of two control blocks."""

    def __init__(self, kind: type[WanAttentionBlock] = WanAttentionBlock, control: bool = False, **switches: bool):
        super().__init__()
        self.blocks = nn.ModuleList([kind(48, 64, 2, **switches) for _ in range(2)])
        self.vace_blocks = nn.ModuleList(
            [VaceWanAttentionBlock(48, 64, 2, block_id=number) for number in range(2 * control)]
        )

    def forward(self, x: Tensor, e: Tensor, context: Tensor, transformer_options: Any = {}) -> Tensor:  # noqa: B006
        common: Any = dict(e=e, context=context, context_img_len=None, transformer_options=transformer_options)
        common["freqs"], c = rotations(x.shape[1], 12), x.flip(1)
        for number, block in enumerate(self.blocks):
            x = block(x, **common)
            if self.vace_blocks:
                skip, c = self.vace_blocks[number](c, x=x, **common)
                x = x + skip
        return x
