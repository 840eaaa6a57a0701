# SPDX-License-Identifier: Apache-2.0
"""Plain stand-ins for the official Wan classes: the same attributes, signatures and arithmetic, written from their
description. WanModel is whole; WanModel_S2V begins where tokens, time and audio are embedded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaLayerNorm
from torch import Tensor, nn


def rope_params(positions: int, dim: int) -> Tensor:
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    return torch.polar(torch.ones_like(angles), angles)


def rope_table(head_dim: int) -> Tensor:
    side = 2 * (head_dim // 6)
    return torch.cat([rope_params(1024, dim) for dim in (head_dim - 2 * side, side, side)], dim=1)


def rope_apply(x: Tensor, grid_sizes: Any, freqs: Tensor) -> Tensor:
    """Rotation in complex128: freqs of every token [B, N, heads, D / 2], or of positions, with grids [B, 3]."""
    out = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))).clone()
    if freqs.dim() == 4:
        return torch.view_as_real(out * freqs).flatten(3).float()
    half = freqs.shape[1]
    t, h, w = freqs.split([half - 2 * (half // 3), half // 3, half // 3], dim=1)
    for i, (frames, height, width) in enumerate(grid_sizes.tolist()):
        grid = (frames, height, width)
        parts = (t[:frames, None, None], h[None, :height, None], w[None, None, :width])
        table = torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).flatten(0, 2)[:, None]
        out[i, : len(table)] = out[i, : len(table)] * table
    return torch.view_as_real(out).flatten(3).float()


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    assert window_size == (-1, -1)
    mask = None
    if k_lens is not None:
        mask = (torch.arange(k.shape[1]) < k_lens[:, None])[:, None, None]
    q, k, v = (part.transpose(1, 2) for part in (q.to(v.dtype), k.to(v.dtype), v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class WanRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class WanLayerNorm(nn.LayerNorm):
    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = False):
        super().__init__(dim, elementwise_affine=elementwise_affine, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


class WanSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool, eps: float):
        super().__init__()
        self.num_heads, self.head_dim, self.window_size = num_heads, dim // num_heads, (-1, -1)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Any, freqs: Tensor) -> Tensor:
        q, k, v = (self.heads(y) for y in (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)))
        q, k = rope_apply(q, grid_sizes, freqs), rope_apply(k, grid_sizes, freqs)
        return self.o(flash_attention(q=q, k=k, v=v, k_lens=seq_lens, window_size=self.window_size).flatten(2))


class WanCrossAttention(WanSelfAttention):
    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:  # type: ignore[override]
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        return self.o(flash_attention(self.heads(q), self.heads(k), self.heads(v), k_lens=context_lens).flatten(2))


class WanAttentionBlock(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, num_heads: int, qk_norm: bool, cross_attn_norm: bool, eps: float):
        super().__init__()
        self.norm1 = WanLayerNorm(dim, eps)
        self.self_attn = WanSelfAttention(dim, num_heads, qk_norm, eps)
        self.norm3 = WanLayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.cross_attn = WanCrossAttention(dim, num_heads, qk_norm, eps)
        self.norm2 = WanLayerNorm(dim, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        e: Any,
        seq_lens: Tensor,
        grid_sizes: Any,
        freqs: Tensor,
        context: Tensor,
        context_lens: Tensor | None,
    ) -> Tensor:
        assert e.dtype == torch.float32
        rows = (self.modulation[None] + e).unbind(2) if e.dim() == 4 else (self.modulation + e).chunk(6, dim=1)
        y = self.self_attn(self.norm1(x).float() * (1 + rows[1]) + rows[0], seq_lens, grid_sizes, freqs)
        x = x + y * rows[2]
        x = x + self.cross_attn(self.norm3(x), context, context_lens)
        return x + self.ffn(self.norm2(x).float() * (1 + rows[4]) + rows[3]) * rows[5]


class Head(nn.Module):
    def __init__(self, dim: int, out_dim: int, eps: float):
        super().__init__()
        self.norm = WanLayerNorm(dim, eps)
        self.head = nn.Linear(dim, out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation[None] + e[:, :, None]).unbind(2)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanModel(nn.Module):
    """x: list of [C, F, H, W]; t [1] or [B, seq_len]; context: list of [L, text_dim]; see the official one."""

    def __init__(
        self,
        dim: int = 48,
        ffn_dim: int = 64,
        num_heads: int = 2,
        num_layers: int = 2,
        in_dim: int = 4,
        text_dim: int = 16,
        text_len: int = 7,
        freq_dim: int = 32,
        qk_norm: bool = True,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.dim, self.in_dim, self.freq_dim, self.text_len = dim, in_dim, freq_dim, text_len
        self.patch_embedding = nn.Conv3d(in_dim, dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(
            [WanAttentionBlock(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps) for _ in range(num_layers)]
        )
        self.head = Head(dim, 4 * in_dim, eps)
        self.freqs = rope_table(dim // num_heads)

    def forward(self, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int) -> list[Tensor]:
        tokens = [self.patch_embedding(u[None]) for u in x]
        grid_sizes = torch.tensor([u.shape[2:] for u in tokens])
        tokens = [u.flatten(2).transpose(1, 2) for u in tokens]
        seq_lens = torch.tensor([u.shape[1] for u in tokens])
        stream = torch.cat([F.pad(u, (0, 0, 0, seq_len - u.shape[1])) for u in tokens])
        t = t[:, None].expand(-1, seq_len) if t.dim() == 1 else t
        half = self.freq_dim // 2
        angles = t.double()[..., None] * 10000.0 ** (-torch.arange(half).double() / half)
        e = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1).float())
        text = torch.stack([F.pad(u, (0, 0, 0, self.text_len - u.shape[0])) for u in context])
        arguments = dict(
            e=self.time_projection(e).unflatten(2, (6, self.dim)),
            seq_lens=seq_lens,
            grid_sizes=grid_sizes,
            freqs=self.freqs,
            context=self.text_embedding(text),
            context_lens=None,
        )
        for block in self.blocks:
            stream = block(stream, **arguments)
        out = []
        for u, (frames, height, width) in zip(self.head(stream, e), grid_sizes.tolist(), strict=True):
            patches = u[: frames * height * width].view(frames, height, width, 2, 2, self.in_dim)
            out.append(patches.permute(5, 0, 1, 3, 2, 4).reshape(self.in_dim, frames, 2 * height, 2 * width))
        return out


class WanS2VAttentionBlock(WanAttentionBlock):
    def forward(
        self,
        x: Tensor,
        e: Any,
        seq_lens: Tensor,
        grid_sizes: Any,
        freqs: Tensor,
        context: Tensor,
        context_lens: Tensor | None,
    ) -> Tensor:
        end = min(max(0, e[1].item()), x.shape[1])
        rows = (self.modulation[:, :, None] + e[0]).unbind(1)

        def spread(row: Tensor) -> Tensor:
            both = (row[:, :1].expand(-1, end, -1), row[:, 1:].expand(-1, x.shape[1] - end, -1))
            return torch.cat(both, dim=1)

        shift1, scale1, gate1, shift2, scale2, gate2 = (spread(row) for row in rows)
        x = x + self.self_attn(self.norm1(x).float() * (1 + scale1) + shift1, seq_lens, grid_sizes, freqs) * gate1
        x = x + self.cross_attn(self.norm3(x), context, context_lens)
        return x + self.ffn(self.norm2(x).float() * (1 + scale2) + shift2) * gate2


class AudioInjector_WAN(nn.Module):
    def __init__(self, dim: int, num_heads: int, inject_layer: list[int], enable_adain: bool):
        super().__init__()
        self.injected_block_id = {block: i for i, block in enumerate(inject_layer)}
        count = range(len(inject_layer))
        self.injector = nn.ModuleList([WanCrossAttention(dim, num_heads, True, 1e-6) for _ in count])
        self.injector_pre_norm_feat = nn.ModuleList(
            [nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in count]
        )
        if enable_adain:
            self.injector_adain_layers = nn.ModuleList(
                [AdaLayerNorm(output_dim=2 * dim, embedding_dim=dim, chunk_dim=1) for _ in count]
            )


class WanModel_S2V(nn.Module):
    """From embedded tokens to the stream behind the last block."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, num_layers: int, inject: list[int], adain: bool = True):
        super().__init__()
        self.patch_embedding = nn.Conv3d(16, dim, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(
            [WanS2VAttentionBlock(dim, ffn_dim, num_heads, True, True, 1e-6) for _ in range(num_layers)]
        )
        self.audio_injector = AudioInjector_WAN(dim, num_heads, inject, adain)
        self.enbale_adain, self.adain_mode, self.use_context_parallel = adain, "attn_norm", False
        self.freqs = rope_table(dim // num_heads)

    def after_transformer_block(self, block_idx: int, hidden_states: Tensor) -> Tensor:
        if block_idx in self.audio_injector.injected_block_id:
            i = self.audio_injector.injected_block_id[block_idx]
            audio = self.merged_audio_emb
            frames, length = audio.shape[1], int(self.original_seq_len)
            y = hidden_states[:, :length].clone().unflatten(1, (frames, -1)).flatten(0, 1)
            if self.enbale_adain and self.adain_mode == "attn_norm":
                y = self.audio_injector.injector_adain_layers[i](y, temb=self.audio_emb_global.flatten(0, 1)[:, 0])
            else:
                y = self.audio_injector.injector_pre_norm_feat[i](y)
            lens = torch.full((len(y),), audio.shape[2])
            y = self.audio_injector.injector[i](x=y, context=audio.flatten(0, 1), context_lens=lens)
            heard = y.unflatten(0, (-1, frames)).flatten(1, 2)
            hidden_states[:, :length] = hidden_states[:, :length] + heard
        return hidden_states

    def forward(
        self, tokens: Tensor, e0: Tensor, noisy: int, freqs: Tensor, text: Tensor, audio: Tensor, audio_global: Tensor
    ) -> Tensor:
        self.merged_audio_emb, self.audio_emb_global = audio, audio_global
        self.original_seq_len = torch.tensor(noisy)
        x = tokens.clone()
        seq_lens = torch.full((len(x),), x.shape[1])
        for index, block in enumerate(self.blocks):
            x = block(
                x,
                e=[e0, self.original_seq_len],
                seq_lens=seq_lens,
                grid_sizes=[],
                freqs=freqs,
                context=text,
                context_lens=None,
            )
            x = self.after_transformer_block(index, x)
        return x
