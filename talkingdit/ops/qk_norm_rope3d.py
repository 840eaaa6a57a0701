# SPDX-License-Identifier: Apache-2.0
"""RMSNorm of queries and keys and their rotation, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from talkingdit._native_loader import native
from talkingdit.ops._checks import check_dims, check_float, check_out, check_same, check_shape, rows
from talkingdit.ops._library import register
from talkingdit.ops._memory import empty
from talkingdit.ops._rope_layout import RopeLayout
from talkingdit.ops.rope3d import check_layout, rope3d_reference

__all__ = ["qk_norm_rope3d", "qk_norm_rope3d_reference"]

_MOST_CHANNELS = 1024  # of a head, in the kernel
# The registered op works on one tensor; the public function calls it for q and for k.
_OPTIONS = "Tensor table, Tensor segments, int[] pairs, bool interleaved, SymInt token_offset, bool per_head, float eps"


def _forward_out(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    segments: Tensor,
    pairs: list[int],
    interleaved: bool,
    token_offset: int,
    per_head: bool,
    eps: float,
    out: Tensor,
) -> None:
    native.qk_norm_rope3d(rows(x), rows(weight), out, table, segments, pairs, interleaved, token_offset, per_head, eps)


def _forward(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    segments: Tensor,
    pairs: list[int],
    interleaved: bool,
    token_offset: int,
    per_head: bool,
    eps: float,
) -> Tensor:
    out = empty(x.shape, x)
    _forward_out(x, weight, table, segments, pairs, interleaved, token_offset, per_head, eps, out)
    return out


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    segments: Tensor,
    pairs: list[int],
    interleaved: bool,
    token_offset: int,
    per_head: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    grad_x = empty(x.shape, x)
    grad_weight = (torch.empty if x.numel() else torch.zeros)(weight.shape, dtype=weight.dtype, device=x.device)
    partial = torch.empty(native.qk_norm_rope3d_chunks(x), weight.shape[0], dtype=weight.dtype, device=x.device)
    native.qk_norm_rope3d_backward(
        rows(grad), rows(x), rows(weight), grad_x, grad_weight, partial, table, segments, pairs, interleaved,
        token_offset, per_head, eps,
    )  # fmt: skip
    return grad_x, grad_weight


_backward_op = register(
    f"qk_norm_rope3d_backward(Tensor grad, Tensor x, Tensor weight, {_OPTIONS}) -> (Tensor, Tensor)",
    _backward,
    lambda grad, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, ctx.table, ctx.segments, *ctx.options = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    grads = _backward_op(grad, *ctx.saved_tensors, ctx.table, ctx.segments, *ctx.options)
    return *grads, None, None, None, None, None, None, None


_op = register(
    f"qk_norm_rope3d(Tensor x, Tensor weight, {_OPTIONS}) -> Tensor",
    _forward,
    lambda x, *_: x.new_empty(x.shape),
    _autograd,
    _setup,
)
_op_out = register(
    f"qk_norm_rope3d_out(Tensor x, Tensor weight, {_OPTIONS}, Tensor(a!) out) -> ()", _forward_out, lambda *_: None
)


def _check(op: str, q: Tensor, k: Tensor, weights: tuple[Tensor, Tensor], layout: RopeLayout, norm: str) -> None:
    check_dims(op, "q", q, "B, N, H, D")
    check_dims(op, "k", k, "B, N, H, D")
    check_float(op, "q", q)
    check_same(op, "k", k, "q", q)
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: k must have the B, N and D of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if norm not in ("all_heads", "per_head"):
        raise ValueError(f"{op}: norm must be 'all_heads' or 'per_head', got {norm!r}")
    for name, weight, x in (("q_weight", weights[0], q), ("k_weight", weights[1], k)):
        heads, dim = x.shape[2:]
        if norm == "per_head":
            check_shape(op, name, weight, (dim,), "D")
        else:
            check_shape(op, name, weight, (heads * dim,), "H*D")
        check_float(op, name, weight)
        check_same(op, name, weight, "q", q, dtype=False)


def qk_norm_rope3d(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    layout: RopeLayout,
    eps: float = 1e-6,
    norm: str = "all_heads",
    token_offset: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``rope3d(rms_norm(q) * q_weight)``, and the same for k.

    Arithmetic is float32 (float64 for float64 input) and rounds once, at the end. The backward pass gives the
    gradients of q, k and both weights; those of the weights are added up in a fixed order.

    Args:
        q: [B, N, H, D], any floating dtype, any strides on the first three axes.
        k: [B, N, H', D]; H' may differ from H (grouped queries).
        q_weight, k_weight: [H * D] ([H' * D]) for "all_heads", [D] for "per_head"; any floating dtype.
        layout: says where tokens are; ``D`` is the sum of its split.
        eps: added to the mean square.
        norm: "all_heads" normalises the heads of a token together (Wan), "per_head" each head (HunyuanVideo).
        token_offset: place of the first token in the layout, for a contiguous shard of the sequence.
        out: preallocated (q, k), may be the inputs; inference only.

    Returns:
        Rotated q and k, in shape and dtype of q and k.

    Raises:
        TypeError, ValueError: dtypes, shapes, head dim or token range do not fit.
        RuntimeError: ``out`` was given while a gradient is needed.
    """
    op = "qk_norm_rope3d"
    _check(op, q, k, (q_weight, k_weight), layout, norm)
    check_layout(op, q, layout, token_offset)
    table, segments = layout.tables(q.device, q.dtype)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    options = (table, segments, layout.pairs, layout.pairing == "interleaved", token_offset, norm == "per_head", eps)
    if out is None:
        return _op(q, q_weight.to(wide), *options), _op(k, k_weight.to(wide), *options)
    for x, weight, target in ((q, q_weight, out[0]), (k, k_weight, out[1])):
        check_out(op, target, x.shape, x.dtype, [x, weight])
        _op_out(x, weight.to(wide), *options, target)
    return out


def _unturned(dim: int, wide: torch.dtype) -> tuple[int, Tensor, Tensor]:
    """Heads that `dim` channels are cut into, and the tables of a layout in which no token is turned, however many."""
    heads = next(n for n in range(-(-dim // _MOST_CHANNELS), dim) if dim % (2 * n) == 0)
    table = torch.tensor([1.0, 0.0], dtype=wide)[:, None].expand(2, dim // heads // 2).contiguous()
    return heads, table, torch.tensor([[0, 1 << 30, 1 << 15, 1 << 15, 0, 0, 0]])


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``rms_norm(x) * weight`` over the last axis on processors, for which torch has many small kernels instead of one.

    It is the norm of `qk_norm_rope3d` with a rotation by nothing.

    Args:
        x: [..., C] on the CPU, any floating dtype, C even. Arithmetic is float32 (float64 for float64).
        weight: [C], any floating dtype.

    Returns:
        As x.

    Raises:
        ValueError: C is odd.
    """
    dim = x.shape[-1]
    if dim % 2:
        raise ValueError(f"rms_norm: x must have an even number of channels, got shape {tuple(x.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads, table, segments = _unturned(dim, wide)
    tokens = x.reshape(1, x.numel() // dim, heads, dim // heads)
    return _op(tokens, weight.to(wide), table, segments, [dim // heads // 2, 0, 0], True, 0, False, eps).view(x.shape)


def qk_norm_rope3d_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    layout: RopeLayout,
    eps: float = 1e-6,
    norm: str = "all_heads",
    token_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`qk_norm_rope3d` in plain PyTorch."""

    def one(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = (-2, -1) if norm == "all_heads" else (-1,)
        normal = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + eps)
        scaled = normal * weight.to(wide.dtype).view(x.shape[2:] if norm == "all_heads" else x.shape[3:])
        return rope3d_reference(scaled, layout, token_offset).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)
