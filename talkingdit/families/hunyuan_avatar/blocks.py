# SPDX-License-Identifier: Apache-2.0
"""The blocks of HunyuanVideo: double-stream, single-stream, and the layer behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.families.hunyuan_avatar.rope import Layouts
from talkingdit.families.hunyuan_avatar.sequence import SequenceShard
from talkingdit.families.hunyuan_avatar.text_refiner import Mlp
from talkingdit.nn.attention import attention
from talkingdit.nn.feed_forward import feed_forward, overwrites
from talkingdit.nn.layers import Float32Linear, GeluTanh, RMSNorm, lend

EPS = 1e-6  # of all norms of the blocks


@dataclass(frozen=True)
class BlockInputs:
    """What all blocks of a step are given besides tensors with gradients, which are arguments of their own."""

    layouts: Layouts
    shard: SequenceShard
    dtype: torch.dtype  # of the linear layers
    lengths: tuple[int, ...] | None = None  # tokens of each sample, the real ones first; None: all have all
    key_mask: Tensor | None = None  # bool [B, N], the same for kernels that need it as a mask
    backend: str = "auto"  # see `talkingdit.nn.attention.attention`
    inplace: bool = False  # streams may be overwritten. Where gradients are recorded they are not.


def attend(q: Tensor, k: Tensor, v: Tensor, inputs: BlockInputs) -> Tensor:
    """Attention of a whole sequence to itself: [B, n, H, D], the tokens of this process."""
    shard = inputs.shard
    if shard.context is not None:
        return attention(
            q, k, v, mask=inputs.key_mask, backend=inputs.backend, context=shard.context, tokens=shard.tokens,
            segments=shard.segments,
        )  # fmt: skip
    if inputs.lengths is None:
        return attention(q, k, v, backend=inputs.backend, segments=shard.segments)
    # Sample by sample, without its padding: kernels that take a mask are slower, and padding is work for nothing.
    rows = []
    for i, length in enumerate(inputs.lengths):
        row = (x[i : i + 1, :length] for x in (q, k, v))
        rows.append(F.pad(attention(*row, backend=inputs.backend), (0, 0, 0, 0, 0, q.shape[1] - length)))
    return torch.cat(rows)


class Modulation(nn.Module):
    """Shifts, scales and gates from the vector of a step."""

    def __init__(self, dim: int, factor: int):
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(dim, factor * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """[B, G, dim], already through SiLU -> `factor` of [B, G, dim]."""
        return self.linear(vec).chunk(self.factor, dim=-1)


class DoubleBlock(nn.Module):
    """Image and text tokens with weights of their own, which attend together.

    Args:
        dim, num_heads, mlp_dim: width, heads, inner width of the feed-forwards.
    """

    img_mod: Modulation
    txt_mod: Modulation
    img_attn_qkv: nn.Module
    txt_attn_qkv: nn.Module
    img_attn_q_norm: nn.Module
    img_attn_k_norm: nn.Module
    txt_attn_q_norm: nn.Module
    txt_attn_k_norm: nn.Module

    def __init__(self, dim: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.num_heads = num_heads
        for name in ("img", "txt"):
            self.add_module(f"{name}_mod", Modulation(dim, 6))
            self.add_module(f"{name}_attn_qkv", nn.Linear(dim, 3 * dim))
            self.add_module(f"{name}_attn_q_norm", RMSNorm(dim // num_heads, EPS))
            self.add_module(f"{name}_attn_k_norm", RMSNorm(dim // num_heads, EPS))
            self.add_module(f"{name}_attn_proj", nn.Linear(dim, dim))
            self.add_module(f"{name}_mlp", Mlp(dim, mlp_dim, GeluTanh()))

    def forward(self, image: Tensor, text: Tensor, vec: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        """One block on both residual streams.

        Args:
            image, text: [B, n, dim], the tokens of this process.
            vec: [B, G, dim], the vector of a step through SiLU, one per clip.
        """
        shard, inplace = inputs.shard, inputs.inplace and overwrites() and not hasattr(self, "_diffusers_hook")
        image_mod, text_mod = self.img_mod(vec), self.txt_mod(vec)
        image_place = shard.ends("image"), shard.offset("image")
        text_place = shard.ends("text"), shard.offset("text")

        y = _modulated(image, image_mod[0], image_mod[1], image_place, inputs.dtype)
        q, k, v = self.img_attn_qkv(y).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        weights = lend(self.img_attn_q_norm)[0], lend(self.img_attn_k_norm)[0]
        q, k = ops.qk_norm_rope3d(
            q, k, *weights, inputs.layouts.image, eps=EPS, norm="per_head", token_offset=image_place[1]
        )
        y = _modulated(text, text_mod[0], text_mod[1], text_place, inputs.dtype)
        text_q, text_k, text_v = self.txt_attn_qkv(y).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        text_q, text_k = self.txt_attn_q_norm(text_q), self.txt_attn_k_norm(text_k)
        q, k, v = (shard.join(*pair) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        y, text_y = shard.split(attend(q, k, v, inputs).flatten(2))
        del q, k, v, text_q, text_k, text_v
        image = self._finish("img", image, y, image_mod, image_place, inplace)
        return image, self._finish("txt", text, text_y, text_mod, text_place, inplace)

    def _finish(
        self,
        name: str,
        x: Tensor,
        y: Tensor,
        modulation: tuple[Tensor, ...],
        place: tuple[list[int], int],
        inplace: bool,
    ) -> Tensor:
        """Output projection of attention y and feed-forward of one stream x."""
        _, _, gate1, shift2, scale2, gate2 = modulation
        proj, mlp = getattr(self, f"{name}_attn_proj"), getattr(self, f"{name}_mlp")
        y = proj(y)
        out = (x, torch.empty_like(y)) if inplace else None
        ends, offset = place
        x, y = ops.gate_residual_norm_modulate(x, y, gate1, scale2, shift2, ends, EPS, offset, dtype=y.dtype, out=out)
        return ops.gate_residual(x, feed_forward(mlp, y, kind=Mlp), gate2, ends, offset, out=x if inplace else None)


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, on image and text tokens in one stream."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.linear1 = nn.Linear(dim, 3 * dim + mlp_dim)
        self.linear2 = nn.Linear(dim + mlp_dim, dim)
        self.q_norm = RMSNorm(dim // num_heads, EPS)
        self.k_norm = RMSNorm(dim // num_heads, EPS)
        self.modulation = Modulation(dim, 3)

    def forward(self, x: Tensor, vec: Tensor, inputs: BlockInputs) -> Tensor:
        """One block on the residual stream x [B, n, dim]; vec [B, G, dim] through SiLU."""
        shard, inplace = inputs.shard, inputs.inplace and overwrites() and not hasattr(self, "_diffusers_hook")
        place = shard.ends("tokens"), shard.begin
        shift, scale, gate = self.modulation(vec)
        wide = self.linear1(_modulated(x, shift, scale, place, inputs.dtype))
        q, k, v = wide[..., : 3 * self.dim].unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        weights = lend(self.q_norm)[0], lend(self.k_norm)[0]
        q, k = ops.qk_norm_rope3d(
            q, k, *weights, inputs.layouts.whole, eps=EPS, norm="per_head", token_offset=shard.begin
        )
        y = attend(q, k, v, inputs).flatten(2)
        del q, k, v
        if inplace:  # the values lie in front of the feed-forward's part: attention goes there, and nothing is copied
            both = wide[..., 2 * self.dim :]
            both[..., : self.dim] = y
            ops.overwrite_with_gelu_tanh(both[..., self.dim :])
        else:
            both = torch.cat([y, ops.gelu_tanh(wide[..., 3 * self.dim :])], dim=-1)
        del y
        return ops.gate_residual(x, self.linear2(both), gate, *place, out=x if inplace else None)


class FinalLayer(nn.Module):
    """Last modulated norm and the projection to latent patches, in float32."""

    def __init__(self, dim: int, out_channels: int):
        super().__init__()
        self.linear = Float32Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Float32Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor, ends: list[int], offset: int = 0) -> Tensor:
        """Video tokens x [B, n, dim], vec [B, G, dim] -> patches [B, n, out_channels]."""
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=-1)
        return self.linear(ops.norm_modulate(x, scale, shift, ends, EPS, offset))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, place: tuple[list[int], int], dtype: torch.dtype) -> Tensor:
    return ops.norm_modulate(x, scale, shift, place[0], EPS, place[1], dtype)
