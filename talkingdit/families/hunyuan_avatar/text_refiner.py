# SPDX-License-Identifier: Apache-2.0
"""Text in HunyuanVideo-Avatar: features of a language model, refined by two blocks that know the timestep."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkingdit.nn.attention import attention
from talkingdit.nn.layers import Float32Linear, LayerNorm, wide


class Mlp(nn.Module):
    """Feed-forward of two layers, with the checkpoints' names."""

    def __init__(self, dim: int, inner: int, activation: nn.Module):
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.act = activation
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return self.fc2(self.act(self.fc1(x)))


def sinusoids(value: Tensor, dim: int) -> Tensor:
    """[...] -> [..., dim] float32, cosines first; frequency j of dim/2 is 10000 ** (-j / (dim/2)).

    Exponents, frequencies and angles are rounded to float32, as where the released models were trained: at a timestep
    of 1000 an angle is off by up to 1e-4 for that, which they know no other way.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=value.device) * -math.log(10000.0) / half
    angle = value.to(torch.float32)[..., None] * exponent.double().exp().float()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class ScalarEmbedder(nn.Module):
    """Sinusoids of a number through two layers, in float32."""

    def __init__(self, dim: int, freq_dim: int):
        super().__init__()
        self.freq_dim = freq_dim
        self.mlp = nn.Sequential(Float32Linear(freq_dim, dim), nn.SiLU(), Float32Linear(dim, dim))

    def forward(self, value: Tensor) -> Tensor:
        """[...] -> [..., dim] float32 (float64 in a float64 model)."""
        return self.mlp(sinusoids(value, self.freq_dim))


class VectorEmbedder(nn.Module):
    """Two layers on a vector, in float32."""

    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.in_layer = Float32Linear(inputs, dim)
        self.out_layer = Float32Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., dim] float32."""
        return self.out_layer(F.silu(self.in_layer(x)))


class ContextEmbedder(nn.Module):
    """`VectorEmbedder` under the names that the mean of the text has in checkpoints."""

    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.linear_1 = Float32Linear(inputs, dim)
        self.linear_2 = Float32Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., dim] float32."""
        return self.linear_2(F.silu(self.linear_1(x)))


class RefinerBlock(nn.Module):
    """Self-attention among the text and a feed-forward, both gated by timestep and mean of the text."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.self_attn_qkv = nn.Linear(dim, 3 * dim)
        self.self_attn_proj = nn.Linear(dim, dim)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, L, dim], condition [B, dim], mask bool [B, L] -> [B, L, dim]."""
        gate1, gate2 = self.adaLN_modulation(condition.to(x.dtype))[:, None].chunk(2, dim=-1)
        q, k, v = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if mask is None:
            y = attention(q, k, v)
        else:  # as in the released program: everybody sees the first token, and padding nothing else
            first = torch.arange(mask.shape[1], device=mask.device) == 0
            y = torch.where(mask[..., None, None], attention(q, k, v, mask=mask | first), v[:, :1])
        x = x + gate1 * self.self_attn_proj(y.flatten(2))
        return x + gate2 * self.mlp(self.norm2(x))


class _Blocks(nn.Module):
    def __init__(self, dim: int, num_heads: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList([RefinerBlock(dim, num_heads) for _ in range(depth)])

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, condition, mask)
        return x


class TextRefiner(nn.Module):
    """Features of a language model to text tokens of the transformer.

    Args:
        text_dim, dim: widths of features and tokens.
        num_heads: of the blocks.
        depth: blocks.
        freq_dim: sinusoids of the timestep.
    """

    def __init__(self, text_dim: int, dim: int, num_heads: int, depth: int, freq_dim: int):
        super().__init__()
        self.input_embedder = nn.Linear(text_dim, dim)
        self.t_embedder = ScalarEmbedder(dim, freq_dim)
        self.c_embedder = ContextEmbedder(text_dim, dim)
        self.individual_token_refiner = _Blocks(dim, num_heads, depth)

    def forward(self, text: Tensor, timestep: Tensor, mask: Tensor | None) -> Tensor:
        """text [B, L, text_dim], timestep [B], mask bool [B, L] or None for all -> tokens [B, L, dim]."""
        dtype = wide(text.dtype)
        if mask is None:
            mean = text.mean(1, dtype=dtype)
        else:
            weights = mask.to(dtype)[..., None]
            mean = (text.to(dtype) * weights).sum(1) / weights.sum(1).clamp(min=1)
        condition = self.t_embedder(timestep) + self.c_embedder(mean)
        x = self.input_embedder(text.to(self.input_embedder.weight.dtype))
        return self.individual_token_refiner(x, condition, mask)


def used_text(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, list[int]]:
    """What is used of padded texts.

    As in the released program, n real tokens of a text put its first n tokens into the sequence, and the refiner sees
    where the real ones are. Where all padding is behind the text these are the same.

    Args:
        text: [B, L, text_dim].
        mask: bool or int [B, L], true for real tokens; None for all.

    Returns:
        What the refiner is given: features without padding that none of the texts needs, and their bool mask, None
        where all are real; and the number of tokens of each text in the sequence.
    """
    if mask is None:
        return text, None, [text.shape[1]] * text.shape[0]
    mask = mask.bool()
    lengths = [int(length) for length in mask.sum(1)]
    used = mask.any(0).nonzero()
    last = max(1, int(used[-1]) + 1 if len(used) else 0)
    text, mask = text[:, :last], mask[:, :last]
    return text, None if bool(mask.all()) else mask, lengths
