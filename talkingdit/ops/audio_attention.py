# SPDX-License-Identifier: Apache-2.0
"""Attention of video tokens to the few audio tokens of their own frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from talkingdit._native_loader import native
from talkingdit.ops._checks import check_dims, check_float, check_out, check_same, check_shape, check_tensor, rows
from talkingdit.ops._host_table import on_device
from talkingdit.ops._library import register
from talkingdit.ops._memory import empty

__all__ = ["audio_attention", "audio_attention_reference"]

_NAME = "audio_attention"
_MAX_SPEAKERS = 64
_MAX_CUDA_DIM = 1024
_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? weights, Tensor? lens, Tensor? clips, "
    "int tokens_per_frame, int token_offset, int window, float scale"
)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _workspace(q: Tensor, k: Tensor, window: int, backward: bool) -> tuple[Tensor, int]:
    """Memory for the kernel (csrc/core/audio_attention.h) and the number of threads it is cut for."""
    slots = torch.get_num_threads()
    size = native.audio_attention_workspace(q, k, window, slots, backward)
    return q.new_empty(size, dtype=_compute_dtype(q.dtype)), slots


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    lens: Tensor | None,
    clips: Tensor | None,
    tokens_per_frame: int,
    token_offset: int,
    window: int,
    scale: float,
    out: Tensor,
) -> None:
    workspace, slots = _workspace(q, k, window, backward=False)
    tensors = (rows(q), rows(k), rows(v), None if weights is None else rows(weights), lens, clips, out, workspace)
    native.audio_attention(*tensors, tokens_per_frame, token_offset, window, scale, slots)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    out = empty(q.shape, q)
    _run(*(q, k, v, *options, out))
    return out


def _backward_run(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    lens: Tensor | None,
    clips: Tensor | None,
    tokens_per_frame: int,
    token_offset: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if q.shape[1] == 0:  # a shard without tokens hears nothing
        grad_weights = q.new_empty(0) if weights is None else weights.new_empty(weights.shape)
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), grad_weights
    grad_q, grad_k, grad_v = empty(q.shape, q), empty(k.shape, k), empty(v.shape, v)
    workspace, slots = _workspace(q, k, window, backward=True)
    terms = None
    if weights is not None:  # one term per head, summed below in a fixed order
        terms = weights.new_empty((q.shape[0], k.shape[1], q.shape[2], q.shape[1]))
        weights = rows(weights)
    tensors = (rows(grad), rows(q), rows(k), rows(v), weights, lens, clips, grad_q, grad_k, grad_v, terms, workspace)
    native.audio_attention_backward(*tensors, tokens_per_frame, token_offset, window, scale, slots)
    return grad_q, grad_k, grad_v, q.new_empty(0) if terms is None else terms.sum(2)


def _backward_fake(grad, q, k, v, weights, *_):  # type: ignore[no-untyped-def]
    grad_weights = q.new_empty(0) if weights is None else weights.new_empty(weights.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_weights


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, weights, lens, clips = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_weights = _op_backward(grad, q, k, v, weights, lens, clips, *ctx.options)
    return grad_q, grad_k, grad_v, None if weights is None else grad_weights, None, None, None, None, None, None


_op_backward = register(
    f"audio_attention_backward(Tensor grad, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)", _backward_run, _backward_fake
)
_op = register(f"audio_attention({_ARGS}) -> Tensor", _forward, lambda q, *_: q.new_empty(q.shape), _backward, _save)
_op_out = register(f"audio_attention_out({_ARGS}, Tensor(a!) out) -> ()", _run, lambda *_: None)


def _clips(name: str, cu_frames: Sequence[int] | Tensor, frames: int, device: torch.device) -> Tensor:
    """First frame and end of the clip of every frame, int64 [F, 2]."""
    if isinstance(cu_frames, Tensor):
        if cu_frames.dim() != 1 or cu_frames.shape[0] < 2 or cu_frames.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name}: cu_frames must be int32 or int64 with one dimension [clips + 1], "
                f"got {cu_frames.dtype} {tuple(cu_frames.shape)}"
            )
        bounds = on_device(cu_frames, torch.int64, device)
    else:
        values = [int(value) for value in cu_frames]
        if len(values) < 2 or values[0] != 0 or values[-1] != frames or values != sorted(values):
            raise ValueError(f"{name}: cu_frames must rise from 0 to the number of frames {frames}, got {values}")
        bounds = on_device(values, torch.int64, device)
    clip = torch.searchsorted(bounds, torch.arange(frames, device=device), right=True).clamp(1, bounds.shape[0] - 1)
    return torch.stack([bounds[clip - 1], bounds[clip]], dim=1).clamp(0, frames)


def _prepare(  # type: ignore[no-untyped-def]
    name: str, q, k, v, tokens_per_frame, token_offset, window, kv_lens, weights, scale, cu_frames
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
    """Checks everything; k and v [B, P, F, A, H, D], weights, lens [B, P, F], clips [F, 2], scale."""
    check_dims(name, "q", q, "B, N, H, D")
    check_float(name, "q", q)
    check_tensor(name, "k", k)
    batch, tokens, heads, dim = q.shape
    if k.dim() not in (5, 6):
        raise ValueError(f"{name}: k must be [B, F, A, H, D] or [B, P, F, A, H, D], got shape {tuple(k.shape)}")
    several = k.dim() == 6
    if k.shape[0] != batch or k.shape[-2:] != q.shape[2:]:
        raise ValueError(
            f"{name}: k must have the batch, heads and head dim of q ({batch}, {heads}, {dim}), "
            f"got shape {tuple(k.shape)}"
        )
    if min(k.shape[1:]) < 1:
        raise ValueError(f"{name}: k must have at least one element on every axis, got shape {tuple(k.shape)}")
    check_same(name, "k", k, "q", q)
    check_shape(name, "v", v, k.shape, "B, P, F, A, H, D" if several else "B, F, A, H, D")
    check_same(name, "v", v, "q", q)
    if several and weights is None:
        raise ValueError(f"{name}: weights [B, P, N] must be given for k with a speaker axis, got None")
    if weights is not None and not several:
        raise ValueError(f"{name}: weights need k with a speaker axis [B, P, F, A, H, D], got k {tuple(k.shape)}")
    if not several:
        k, v = k.unsqueeze(1), v.unsqueeze(1)
    _, speakers, frames, _, _, _ = k.shape
    if speakers > _MAX_SPEAKERS:
        raise ValueError(f"{name}: at most {_MAX_SPEAKERS} speakers are supported, got {speakers}")
    if q.is_cuda and dim > _MAX_CUDA_DIM:
        raise ValueError(f"{name}: the head dim must be at most {_MAX_CUDA_DIM} on CUDA, got {dim}")
    if tokens_per_frame < 1:
        raise ValueError(f"{name}: tokens_per_frame must be at least 1, got {tokens_per_frame}")
    if window < 0:
        raise ValueError(f"{name}: window must be 0 or more frames, got {window}")
    if token_offset < 0 or token_offset + tokens > frames * tokens_per_frame:
        raise ValueError(
            f"{name}: tokens must lie inside the {frames} frames of {tokens_per_frame} tokens that k has "
            f"({frames * tokens_per_frame}), got tokens {token_offset} to {token_offset + tokens}"
        )
    if weights is not None:
        check_shape(name, "weights", weights, (batch, speakers, tokens), "B, P, N")
        check_float(name, "weights", weights)
        check_same(name, "weights", weights, "q", q, dtype=False)
        weights = weights.to(_compute_dtype(q.dtype))
    if kv_lens is not None:
        check_tensor(name, "kv_lens", kv_lens)
        if kv_lens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: kv_lens must be int32 or int64, got {kv_lens.dtype}")
        if tuple(kv_lens.shape) not in {(batch, frames), (batch, speakers, frames)}:
            raise ValueError(
                f"{name}: kv_lens must have shape [B, F] = {(batch, frames)} or [B, P, F] = "
                f"{(batch, speakers, frames)}, got {tuple(kv_lens.shape)}"
            )
        check_same(name, "kv_lens", kv_lens, "q", q, dtype=False)
        kv_lens = kv_lens.to(torch.int64)
        kv_lens = kv_lens if kv_lens.dim() == 3 else kv_lens.unsqueeze(1).expand(batch, speakers, frames)
    clips = None if cu_frames is None else _clips(name, cu_frames, frames, q.device)
    return k, v, weights, kv_lens, clips, float(dim**-0.5 if scale is None else scale)


def audio_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    token_offset: int = 0,
    window: int = 0,
    kv_lens: Tensor | None = None,
    weights: Tensor | None = None,
    scale: float | None = None,
    cu_frames: Sequence[int] | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Every video token attends to the audio tokens of its frame, or of the frames within ``window`` of it.

    Token n of ``q`` belongs to frame ``(token_offset + n) // tokens_per_frame``. With several speakers the result is
    ``sum_p weights[:, p] * attention_p``, each with a softmax of its own. Softmax and sums are float32 (float64 for
    float64 tensors) and are rounded once. The gradients of q, k, v and weights are deterministic.

    Args:
        q: [B, N, H, D], any contiguous shard of the tokens, also one that cuts a frame; float32, float64, bfloat16 or
            float16, any strides on the first three axes.
        k, v: [B, F, A, H, D] audio tokens of *all* F frames (not of the shard), or [B, P, F, A, H, D] for P speakers.
        tokens_per_frame: video tokens of one latent frame.
        token_offset: place of ``q[:, 0]`` in the whole sequence.
        window: frames on each side that are attended too; frames beyond the ends of the clip do not exist.
        kv_lens: int [B, F] or [B, P, F], the number of leading audio tokens that are valid, 0 to A (others are cut to
            that range). A token with no valid audio at all gets zeros.
        weights: [B, P, N] for the tokens of the shard (face masks, 0..1), float32 or the dtype of q. Required with, and
            only with, a speaker axis.
        scale: of the products before the softmax; ``D ** -0.5`` by default.
        cu_frames: for several clips of different lengths packed into one sequence: frame boundaries of the clips,
            rising from 0 to F ([0, 21, 34, 55]). Windows do not cross them. All clips have the same tokens_per_frame,
            and the boundaries hold for every sample. A tensor's values are trusted to rise from 0 to F.
        out: preallocated result; inference only.

    Returns:
        [B, N, H, D] in the dtype of q.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or the token range do not fit.
        RuntimeError: ``out`` was given while a gradient is needed.
    """
    k, v, weights, lens, clips, factor = _prepare(
        _NAME, q, k, v, tokens_per_frame, token_offset, window, kv_lens, weights, scale, cu_frames
    )
    if out is None:
        return _op(q, k, v, weights, lens, clips, tokens_per_frame, token_offset, window, factor)
    check_out(_NAME, out, q.shape, q.dtype, [q, k, v] if weights is None else [q, k, v, weights])
    _op_out(q, k, v, weights, lens, clips, tokens_per_frame, token_offset, window, factor, out)
    return out


def audio_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    token_offset: int = 0,
    window: int = 0,
    kv_lens: Tensor | None = None,
    weights: Tensor | None = None,
    scale: float | None = None,
    cu_frames: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """:func:`audio_attention` in plain PyTorch: dense attention to all F * A audio tokens under a mask."""
    k, v, weights, lens, clips, factor = _prepare(
        "audio_attention_reference",
        *(q, k, v, tokens_per_frame, token_offset, window, kv_lens, weights, scale, cu_frames),
    )
    compute = _compute_dtype(q.dtype)
    batch, speakers, frames, audio, _, _ = k.shape
    frame = (token_offset + torch.arange(q.shape[1], device=q.device)) // tokens_per_frame  # [N]
    other = torch.arange(frames, device=q.device)
    attended = (frame[:, None] - other).abs() <= window  # [N, F]
    if clips is not None:
        attended &= (other >= clips[frame, :1]) & (other < clips[frame, 1:])
    mask = attended[None, None, :, :, None].expand(batch, speakers, -1, -1, audio)  # [B, P, N, F, A]
    if lens is not None:
        valid = torch.arange(audio, device=q.device) < lens[..., None]  # [B, P, F, A]
        mask = mask & valid[:, :, None]
    scores = torch.einsum("bnhd,bpfahd->bphnfa", q.to(compute), k.to(compute)) * factor
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf).flatten(-2)
    empty_rows = ~mask.flatten(-2).any(-1)[:, :, None, :, None]
    probabilities = torch.softmax(scores.masked_fill(empty_rows, 0.0), dim=-1).masked_fill(empty_rows, 0.0)
    if weights is not None:
        probabilities = probabilities * weights[:, :, None, :, None]
    return torch.einsum("bphnk,bpkhd->bnhd", probabilities, v.to(compute).flatten(2, 3)).to(q.dtype)
