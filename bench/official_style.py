# SPDX-License-Identifier: Apache-2.0
"""Wan-S2V computed the way the official program computes it: eagerly, in many small steps, everything in every call.

The baseline of `bench.wan_block`, and the truth that tests hold the model against: in float64 the arithmetic is exact
for that purpose, and nothing here uses talkingdit. Weights come as a mapping from official parameter names.

What is kept of the official program's habits, because they cost time and memory: rotations as a complex128 table that
is repeated for every head, made on the host in every call and multiplied in float64, sample by sample; modulation range
by range with a concatenation behind it; the residual stream in float32 under autocast; a clone before audio attention;
audio, text and history encoded in every call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
# First position, number of tokens and positions spanned, on the time, height and width axis.
Places = tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]

BUCKETS = (1, 2, 16)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[name + ".weight"], w[name + ".bias"])


def wide_linear(w: Weights, name: str, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(wide(x), wide(w[name + ".weight"]), wide(w[name + ".bias"]))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).type_as(x) * weight


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    y = wide(x)
    if weight is not None and bias is not None:
        return F.layer_norm(y, x.shape[-1:], weight.to(y.dtype), bias.to(y.dtype), eps).type_as(x)
    return F.layer_norm(y, x.shape[-1:], eps=eps).type_as(x)


# --- places ---------------------------------------------------------------------------------------------------------


def positions(start: int, count: int, span: int) -> list[int]:
    """`count` whole positions spread over start .. start + span - 1. Truncated, not rounded."""
    if start >= 0:
        return [int(p) for p in np.linspace(start, start + span - 1, count)]
    return [-int(p) for p in np.linspace(-start, -start - span + 1, count)]


def rotations(head_dim: int, segments: Sequence[Places]) -> Tensor:
    """complex128 [tokens, 1, head_dim / 2]."""
    pairs = head_dim // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    tables = []
    for start, count, span in segments:
        axes = []
        for axis, n in enumerate(split):
            frequency = 10000.0 ** -(torch.arange(0, 2 * n, 2, dtype=torch.float64) / (2 * n))
            places = torch.tensor(positions(start[axis], count[axis], span[axis]), dtype=torch.float64)
            angle = torch.outer(places, frequency)
            shape = [1, 1, 1, n]
            shape[axis] = count[axis]
            axes.append(torch.polar(torch.ones_like(angle), angle).view(shape).expand(*count, n))
        tables.append(torch.cat(axes, dim=-1).flatten(0, 2))
    return torch.cat(tables)[:, None]


def rope_table(head_dim: int, heads: int, segments: Sequence[Places], device: torch.device) -> Tensor:
    """The rotations repeated for every head, complex128 [tokens, heads, head_dim / 2] on the device."""
    table = rotations(head_dim, segments)
    repeated = torch.empty(len(table), heads, head_dim // 2, dtype=torch.complex128, device=device)
    repeated[:] = table
    return repeated


def rope(x: Tensor, table: Tensor) -> Tensor:
    """x [B, N, heads, head_dim] turned, in float32 (float64 for float64)."""
    turned = []
    for sample in x:
        pairs = torch.view_as_complex(sample.to(torch.float64).unflatten(-1, (-1, 2)))
        turned.append(torch.view_as_real(pairs * table).flatten(2))
    return torch.stack(turned).to(torch.promote_types(x.dtype, torch.float32))


# --- blocks ---------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, heads, head_dim] in v's dtype inside (as flash attention works), q's outside."""
    dtype = q.dtype
    if dtype == torch.float64:
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).to(dtype)


def attention(
    w: Weights, name: str, x: Tensor, context: Tensor, heads: int, eps: float, table: Tensor | None = None
) -> Tensor:
    q = rms_norm(linear(w, name + ".q", x), w[name + ".norm_q.weight"], eps).unflatten(-1, (heads, -1))
    k = rms_norm(linear(w, name + ".k", context), w[name + ".norm_k.weight"], eps).unflatten(-1, (heads, -1))
    v = linear(w, name + ".v", context).unflatten(-1, (heads, -1))
    if table is not None:
        q, k = rope(q, table), rope(k, table)
    return linear(w, name + ".o", attend(q, k, v).flatten(2))


def by_range(x: Tensor, split: int, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """x [B, N, dim] * scale + shift: row 0 of [B, 2, dim] for tokens before the split, row 1 for those behind."""
    parts = []
    for row, part in enumerate((x[:, :split], x[:, split:])):
        part = part * scale[:, row : row + 1]
        parts.append(part if shift is None else part + shift[:, row : row + 1])
    return torch.cat(parts, dim=1)


def block(
    w: Weights, name: str, x: Tensor, time: Tensor, split: int, table: Tensor, text: Tensor, heads: int, eps: float
) -> Tensor:
    """x [B, N, dim], time [B, 6, 2, dim], table of `rope_table`, text [B, L, dim] -> [B, N, dim]."""
    e = [part.squeeze(1) for part in (wide(w[name + ".modulation"])[:, :, None] + time).chunk(6, dim=1)]
    y = by_range(wide(layer_norm(x, eps)), split, 1 + e[1], e[0])
    x = x + by_range(attention(w, name + ".self_attn", y, y, heads, eps, table), split, e[2])
    normal = layer_norm(x, eps, w[name + ".norm3.weight"], w[name + ".norm3.bias"])
    x = x + attention(w, name + ".cross_attn", normal, text, heads, eps)
    y = by_range(wide(layer_norm(x, eps)), split, 1 + e[4], e[3])
    y = linear(w, name + ".ffn.2", F.gelu(linear(w, name + ".ffn.0", y), approximate="tanh"))
    return x + by_range(y, split, e[5])


def hear(
    config: Mapping[str, Any],
    w: Weights,
    index: int,
    x: Tensor,
    noisy: int,
    audio: Tensor,
    vectors: Tensor | None,
) -> Tensor:
    """x [B, N, dim] after audio attention of its first `noisy` tokens to audio [B, F, A, dim]; vectors [B, F, dim]."""
    frames = audio.shape[1]
    y = x[:, :noisy].clone().unflatten(1, (frames, -1)).flatten(0, 1)
    if config["enable_adain"] and config.get("adain_mode", "attn_norm") == "attn_norm":
        assert vectors is not None
        name = f"audio_injector.injector_adain_layers.{index}.linear"
        shift, scale = linear(w, name, F.silu(vectors.flatten(0, 1))).chunk(2, dim=1)
        y = layer_norm(y, 1e-5) * (1 + scale[:, None]) + shift[:, None]
    else:
        y = layer_norm(y, 1e-6)
    y = attention(w, f"audio_injector.injector.{index}", y, audio.flatten(0, 1), config["num_heads"], 1e-6)
    x[:, :noisy] = x[:, :noisy] + y.unflatten(0, (-1, frames)).flatten(1, 2)
    return x


# --- conditions -----------------------------------------------------------------------------------------------------


def causal_conv(w: Weights, name: str, x: Tensor, stride: int) -> Tensor:
    """x [B, n, C] with its first frame repeated twice in front."""
    x = F.pad(x.transpose(1, 2), (2, 0), mode="replicate")
    weight, bias = wide(w[name + ".conv.weight"]), wide(w[name + ".conv.bias"])
    return F.conv1d(x, weight, bias, stride=stride).transpose(1, 2)


def audio_tokens(
    config: Mapping[str, Any], w: Weights, audio: Tensor, motion_frames: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """audio [B, layers, audio_dim, 4 F] -> tokens [B, F, A + 1, dim], vectors [B, F, dim]."""
    root = "casual_audio_encoder."
    audio = wide(torch.cat([audio[..., :1].repeat(1, 1, 1, motion_frames[0]), audio], dim=-1))
    share = F.silu(wide(w[root + "weights"]))
    x = (audio * share / share.sum(1, keepdim=True)).sum(1).transpose(1, 2)

    def rest(y: Tensor) -> Tensor:
        for conv in ("conv2", "conv3"):
            y = F.silu(layer_norm(y, 1e-6))
            y = causal_conv(w, f"{root}encoder.{conv}", y, 2)
        return F.silu(layer_norm(y, 1e-6))

    local = causal_conv(w, root + "encoder.conv1_local", x, 1)
    groups = local.chunk(config["num_audio_token"], dim=-1)
    tokens = torch.stack([rest(group) for group in groups], dim=2)
    last = wide(w[root + "encoder.padding_tokens"]).expand(tokens.shape[0], tokens.shape[1], -1, -1)
    tokens = torch.cat([tokens, last], dim=2)[:, motion_frames[1] :]
    if not config["enable_adain"]:
        return tokens, None
    vectors = wide_linear(w, root + "encoder.final_linear", rest(causal_conv(w, root + "encoder.conv1_global", x, 1)))
    return tokens, vectors[:, motion_frames[1] :]


def patches(w: Weights, name: str, video: Tensor) -> Tensor:
    """Convolution whose stride is its kernel: [B, C, T, H, W] -> [B, n, dim]."""
    weight = w[name + ".weight"]
    return F.conv3d(video, weight, w[name + ".bias"], stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def packed_history(
    config: Mapping[str, Any], w: Weights, history: Sequence[Tensor], add_last: int
) -> tuple[Tensor, list[Places]]:
    """Per sample [C, n, H, W] -> tokens [B, n, dim], newest bucket first, and their places."""
    drop = config["framepack_drop_mode"] == "drop"
    height, width = history[0].shape[2:]
    rows = []
    for latents in history:
        kept = latents.new_zeros(latents.shape[0], sum(BUCKETS), height, width)
        n = min(latents.shape[1], sum(BUCKETS))
        if n:
            kept[:, -n:] = latents[:, -n:]
        if add_last < 2 and not drop:
            kept[:, -sum(BUCKETS[: 2 - add_last]) :] = 0
        oldest, middle, newest = kept[None].split(BUCKETS[::-1], dim=2)
        parts = [patches(w, "frame_packer.proj_4x", oldest)]
        if not drop or add_last >= 1:
            parts.insert(0, patches(w, "frame_packer.proj_2x", middle))
        if not drop or add_last == 2:
            parts.insert(0, patches(w, "frame_packer.proj", newest))
        rows.append(torch.cat(parts, dim=1))
    places: list[Places] = []
    for i, shrink in enumerate((1, 2, 4)):
        if drop and i < 2 - add_last:
            continue
        span = (BUCKETS[i], height // 2, width // 2)
        count = (BUCKETS[i] // shrink, height // (2 * shrink), width // (2 * shrink))
        places.append(((-sum(BUCKETS[: i + 1]), 0, 0), count, span))
    return torch.cat(rows), places


def time_modulation(config: Mapping[str, Any], w: Weights, t: Tensor) -> tuple[Tensor, Tensor]:
    """t [B] -> time [B, dim] and its projections [B, 6, dim]."""
    half = config["freq_dim"] // 2
    angle = torch.outer(t.to(torch.float64), 10000.0 ** (-torch.arange(half, device=t.device).double() / half))
    sinusoids = torch.cat([angle.cos(), angle.sin()], dim=1).float()
    time = F.silu(wide_linear(w, "time_embedding.0", sinusoids.to(wide(w["time_embedding.0.weight"]).dtype)))
    time = wide_linear(w, "time_embedding.2", time)
    return time, wide_linear(w, "time_projection.1", F.silu(time)).unflatten(1, (6, -1))


# --- the whole model ------------------------------------------------------------------------------------------------


def forward(
    config: Mapping[str, Any],
    w: Weights,
    x: Tensor,
    t: Tensor,
    context: Sequence[Tensor],
    ref: Tensor,
    motion: Sequence[Tensor],
    pose: Tensor,
    audio: Tensor,
    motion_frames: Sequence[int] = (73, 19),
    add_last_motion: int = 2,
    drop_motion: bool = False,
) -> Tensor:
    """Velocity [B, out_dim, T, H, W].

    Args:
        config: constructor settings by their official names.
        x: [B, in_dim, T, H, W]. t: [B]. context: per sample [L, text_dim]. ref: [B, in_dim, 1, H, W].
        motion: per sample [in_dim, n, H, W]. pose: like x. audio: [B, layers, audio_dim, 4 T].
        motion_frames: pixel and latent frames of history that the audio is repeated for.
    """
    heads, eps = config["num_heads"], config.get("eps", 1e-6)
    head_dim = config["dim"] // heads
    batch, _, frames, height, width = x.shape
    rows, columns = height // 2, width // 2
    noisy = frames * rows * columns
    add_last_motion *= int(config["add_last_motion"])
    heard, vectors = audio_tokens(config, w, audio, motion_frames)

    parts = [patches(w, "patch_embedding", x) + patches(w, "cond_encoder", pose), patches(w, "patch_embedding", ref)]
    segments: list[Places] = [((0, 0, 0), (frames, rows, columns), (frames, rows, columns))]
    segments.append(((30, 0, 0), (1, rows, columns), (1, rows, columns)))
    if not drop_motion and config["enable_framepack"]:
        packed, places = packed_history(config, w, motion, add_last_motion)
        parts.append(packed)
        segments += places
    elif not drop_motion and motion[0].shape[1]:
        past = motion[0].shape[1]
        parts.append(patches(w, "patch_embedding", torch.stack(list(motion))))
        segments.append(((-past, 0, 0), (past, rows, columns), (past, rows, columns)))
    kinds = [torch.full((part.shape[1],), kind, device=x.device) for kind, part in enumerate(parts)]
    tokens = torch.cat(parts, dim=1) + w["trainable_cond_mask.weight"][torch.cat(kinds)]
    table = rope_table(head_dim, heads, segments, x.device)

    time, projected = time_modulation(config, w, torch.cat([t, t.new_zeros(1)]))
    rest = projected[-1:].expand(batch, -1, -1) if config["zero_timestep"] else projected[:-1]
    modulation = torch.stack([projected[:-1], rest], dim=2)

    padded = [torch.cat([text, text.new_zeros(config["text_len"] - len(text), text.shape[1])]) for text in context]
    text = F.gelu(linear(w, "text_embedding.0", torch.stack(padded)), approximate="tanh")
    text = linear(w, "text_embedding.2", text)

    for i in range(config["num_layers"]):
        tokens = block(w, f"blocks.{i}", tokens, modulation, noisy, table, text, heads, eps)
        if i in config["audio_inject_layers"]:
            tokens = hear(config, w, list(config["audio_inject_layers"]).index(i), tokens, noisy, heard, vectors)

    e = (wide(w["head.modulation"]) + time[:-1, None]).chunk(2, dim=1)
    out = wide_linear(w, "head.head", wide(layer_norm(tokens[:, :noisy], eps)) * (1 + e[1]) + e[0])
    out = out.view(batch, frames, rows, columns, 1, 2, 2, -1)
    return torch.einsum("bfhwpqrc->bcfphqwr", out).reshape(batch, -1, frames, 2 * rows, 2 * columns)
