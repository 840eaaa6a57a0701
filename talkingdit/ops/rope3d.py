# SPDX-License-Identifier: Apache-2.0
"""3D rotary embedding of a sequence made of segments: video, references, anchors, packed history, audio."""

from __future__ import annotations

import torch
from torch import Tensor

from talkingdit._native_loader import native
from talkingdit.ops._checks import check_dims, check_float, check_out, rows
from talkingdit.ops._library import register
from talkingdit.ops._memory import empty
from talkingdit.ops._rope_layout import RopeLayout

__all__ = ["rope3d", "rope3d_reference"]

_SCHEMA = "Tensor table, Tensor segments, int[] pairs, bool interleaved, SymInt token_offset, bool inverse"


def _rope3d(
    x: Tensor, table: Tensor, segments: Tensor, pairs: list[int], interleaved: bool, token_offset: int, inverse: bool
) -> Tensor:
    out = empty(x.shape, x)
    native.rope3d(rows(x), out, table, segments, pairs, interleaved, token_offset, inverse)
    return out


def _rope3d_out(
    x: Tensor,
    table: Tensor,
    segments: Tensor,
    pairs: list[int],
    interleaved: bool,
    token_offset: int,
    inverse: bool,
    out: Tensor,
) -> None:
    native.rope3d(rows(x), out, table, segments, pairs, interleaved, token_offset, inverse)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ctx.table, ctx.segments, *ctx.options = inputs


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    # The transpose of a rotation (and of a mean of rotations) is its conjugate.
    pairs, interleaved, token_offset, inverse = ctx.options
    grad_x = _op(grad, ctx.table, ctx.segments, pairs, interleaved, token_offset, not inverse)
    return grad_x, None, None, None, None, None, None


_op = register(f"rope3d(Tensor x, {_SCHEMA}) -> Tensor", _rope3d, lambda x, *_: x.new_empty(x.shape), _backward, _save)
_op_out = register(f"rope3d_out(Tensor x, {_SCHEMA}, Tensor(a!) out) -> ()", _rope3d_out, lambda *_: None)


def check_layout(op: str, x: Tensor, layout: RopeLayout, token_offset: int) -> None:
    """Does a shard ``x`` [B, N, H, D] lie inside the layout, with the head dim of its split?"""
    if not isinstance(layout, RopeLayout):
        raise TypeError(f"{op}: layout must be a RopeLayout, got {type(layout).__name__}")
    if x.shape[3] != layout.dim:
        raise ValueError(f"{op}: split {layout.split} is for head dim {layout.dim}, got head dim {x.shape[3]}")
    if token_offset < 0 or token_offset + x.shape[1] > layout.length:
        raise ValueError(
            f"{op}: tokens must lie inside the layout of {layout.length} tokens, "
            f"got tokens {token_offset} to {token_offset + x.shape[1]}"
        )


def rope3d(
    x: Tensor, layout: RopeLayout, token_offset: int = 0, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """Rotates every token by the angles of its place in the layout.

    Angles come from float64; arithmetic is float32 (float64 for float64 input) and rounds once.

    Args:
        x: [B, N, H, D], float32, float64, bfloat16 or float16; any strides on the first three axes.
        layout: says where tokens are; ``D`` is the sum of its split.
        token_offset: place of ``x[:, 0]`` in the layout, for a contiguous shard of the sequence.
        inverse: rotate back (by the conjugate).
        out: preallocated result, may be ``x``; inference only.

    Returns:
        [B, N, H, D] in the dtype of x.

    Raises:
        TypeError, ValueError: dtype, rank, head dim or token range do not fit.
        RuntimeError: ``out`` was given while a gradient is needed.
    """
    check_dims("rope3d", "x", x, "B, N, H, D")
    check_float("rope3d", "x", x)
    check_layout("rope3d", x, layout, token_offset)
    table, segments = layout.tables(x.device, x.dtype)
    interleaved = layout.pairing == "interleaved"
    if out is None:
        return _op(x, table, segments, layout.pairs, interleaved, token_offset, inverse)
    check_out("rope3d", out, x.shape, x.dtype, [x])
    _op_out(x, table, segments, layout.pairs, interleaved, token_offset, inverse, out)
    return out


def rope3d_reference(x: Tensor, layout: RopeLayout, token_offset: int = 0, inverse: bool = False) -> Tensor:
    """:func:`rope3d` in plain PyTorch: complex numbers and a table of all rotations."""
    check_layout("rope3d_reference", x, layout, token_offset)
    wide = x if x.dtype == torch.float64 else x.float()
    rotation = layout.rotations()[token_offset : token_offset + x.shape[1]]
    rotation = (rotation.conj() if inverse else rotation)[:, None, :].to(x.device)
    c, s = rotation.real.to(wide.dtype), rotation.imag.to(wide.dtype)
    if layout.pairing == "interleaved":
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)
    else:
        a, b = wide.chunk(2, dim=-1)
        rotated = torch.cat([a * c - b * s, b * c + a * s], dim=-1)
    return rotated.to(x.dtype)
