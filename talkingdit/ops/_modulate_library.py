# SPDX-License-Identifier: Apache-2.0
"""The registered ops behind :mod:`talkingdit.ops.modulate`: each with its backward and a form with given results.

One native kernel forward and one backward serve all three; what an op does not have is None. Shapes: x, y, residual and
their gradients [B, N, dim]; gate, scale, shift and theirs [B, G, dim] in the type that is computed in. ``per_group``
(0: use ``ends``), ``ends`` and ``token_offset`` say which group a token belongs to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from talkingdit._native_loader import native
from talkingdit.ops._checks import rows
from talkingdit.ops._library import register
from talkingdit.ops._memory import empty

_PLACE = "SymInt per_group, SymInt[] ends, SymInt token_offset"


def _partial(grad: Tensor, modulation: Tensor, per_group: int, ends: list[int], token_offset: int) -> Tensor:
    """Room for the sums that threads or blocks leave: of scale, shift and gate."""
    batch, tokens, dim = grad.shape
    chunks = native.modulate_chunks(grad, modulation.shape[1], per_group, ends, token_offset) if tokens else 0
    return modulation.new_empty(batch * chunks, 3, dim)


def _alike(value: Tensor) -> Tensor:
    """A tensor for backward on a GPU, whose fast kernels want all tensors to lie as the gradients that they make do."""
    return value.contiguous() if value.is_cuda else rows(value)


def _sums(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient of scale, shift or gate: with tokens every sum is written, also of groups outside the shard."""
    return empty(like.shape, like) if grad.shape[1] else like.new_zeros(like.shape)


# ---- norm_modulate -------------------------------------------------------------------------------------------------
def _norm_modulate_out(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    per_group: int,
    ends: list[int],
    token_offset: int,
    eps: float,
    out: Tensor,
) -> None:
    native.modulate_forward(
        rows(x), None, None, rows(scale), rows(shift), None, out, per_group, ends, token_offset, eps
    )


def _norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    per_group: int,
    ends: list[int],
    token_offset: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    out = empty(x.shape, x, dtype)
    _norm_modulate_out(x, scale, shift, per_group, ends, token_offset, eps, out)
    return out


def _norm_modulate_backward(
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    per_group: int,
    ends: list[int],
    token_offset: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_scale, grad_shift = empty(x.shape, x), _sums(grad_out, scale), _sums(grad_out, scale)
    partial = _partial(grad_out, scale, per_group, ends, token_offset)
    native.modulate_backward(
        _alike(x), None, None, rows(scale), None, _alike(grad_out), grad_x, None, None, grad_scale, grad_shift, partial,
        per_group, ends, token_offset, eps,
    )  # fmt: skip
    return grad_x, grad_scale, grad_shift


_norm_modulate_backward_op = register(
    f"norm_modulate_backward(Tensor grad_out, Tensor residual, Tensor scale, {_PLACE}, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _norm_modulate_backward,
    lambda grad_out, x, scale, *_: tuple(t.new_empty(t.shape) for t in (x, scale, scale)),
)


def _norm_modulate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, _, *ctx.options, _ = inputs
    ctx.save_for_backward(x, scale)


def _norm_modulate_autograd(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    grads = _norm_modulate_backward_op(grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


norm_modulate_op = register(
    f"norm_modulate(Tensor x, Tensor scale, Tensor shift, {_PLACE}, float eps, ScalarType dtype) -> Tensor",
    _norm_modulate,
    lambda x, scale, shift, per_group, ends, token_offset, eps, dtype: x.new_empty(x.shape, dtype=dtype),
    _norm_modulate_autograd,
    _norm_modulate_setup,
)
norm_modulate_out_op = register(
    f"norm_modulate_out(Tensor x, Tensor scale, Tensor shift, {_PLACE}, float eps, Tensor(a!) out) -> ()",
    _norm_modulate_out,
    lambda *_: None,
)


# ---- gate_residual -------------------------------------------------------------------------------------------------
def _gate_residual_out(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    per_group: int,
    ends: list[int],
    token_offset: int,
    residual: Tensor,
) -> None:
    native.modulate_forward(
        rows(x), rows(y), rows(gate), None, None, residual, None, per_group, ends, token_offset, 0.0
    )


def _gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    per_group: int,
    ends: list[int],
    token_offset: int,
) -> Tensor:
    residual = empty(x.shape, x)
    _gate_residual_out(x, y, gate, per_group, ends, token_offset, residual)
    return residual


def _gate_residual_backward(
    grad_residual: Tensor,
    y: Tensor,
    gate: Tensor,
    per_group: int,
    ends: list[int],
    token_offset: int,
) -> tuple[Tensor, Tensor]:
    grad_y, grad_gate = empty(y.shape, y), _sums(grad_residual, gate)
    partial = _partial(grad_residual, gate, per_group, ends, token_offset)
    native.modulate_backward(
        None, _alike(y), rows(gate), None, _alike(grad_residual), None, None, grad_y, grad_gate, None, None, partial,
        per_group, ends, token_offset, 0.0,
    )  # fmt: skip
    return grad_y, grad_gate


_gate_residual_backward_op = register(
    f"gate_residual_backward(Tensor grad_residual, Tensor y, Tensor gate, {_PLACE}) -> (Tensor, Tensor)",
    _gate_residual_backward,
    lambda grad_residual, y, gate, *_: tuple(t.new_empty(t.shape) for t in (y, gate)),
)


def _gate_residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gate, *ctx.options = inputs
    ctx.save_for_backward(y, gate)


def _gate_residual_autograd(ctx: Any, grad_residual: Tensor) -> tuple[Any, ...]:
    grads = _gate_residual_backward_op(grad_residual, *ctx.saved_tensors, *ctx.options)
    return grad_residual, *grads, None, None, None


gate_residual_op = register(
    f"gate_residual(Tensor x, Tensor y, Tensor gate, {_PLACE}) -> Tensor",
    _gate_residual,
    lambda x, *_: x.new_empty(x.shape),
    _gate_residual_autograd,
    _gate_residual_setup,
)
gate_residual_out_op = register(
    f"gate_residual_out(Tensor x, Tensor y, Tensor gate, {_PLACE}, Tensor(a!) residual) -> ()",
    _gate_residual_out,
    lambda *_: None,
)


# ---- gate_residual_norm_modulate -----------------------------------------------------------------------------------
def _both_out(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    per_group: int,
    ends: list[int],
    token_offset: int,
    eps: float,
    residual: Tensor,
    out: Tensor,
) -> None:
    native.modulate_forward(
        rows(x), rows(y), rows(gate), rows(scale), rows(shift), residual, out, per_group, ends, token_offset, eps
    )


def _both(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    per_group: int,
    ends: list[int],
    token_offset: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    residual, out = empty(x.shape, x), empty(x.shape, x, dtype)
    _both_out(x, y, gate, scale, shift, per_group, ends, token_offset, eps, residual, out)
    return residual, out


def _both_backward(
    grad_residual: Tensor,
    grad_out: Tensor,
    residual: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    per_group: int,
    ends: list[int],
    token_offset: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_y = empty(residual.shape, residual), empty(y.shape, y)
    grad_gate, grad_scale, grad_shift = (_sums(grad_out, t) for t in (gate, scale, scale))
    partial = _partial(grad_out, gate, per_group, ends, token_offset)
    native.modulate_backward(
        _alike(residual), _alike(y), rows(gate), rows(scale), _alike(grad_residual), _alike(grad_out), grad_x, grad_y,
        grad_gate, grad_scale, grad_shift, partial, per_group, ends, token_offset, eps,
    )  # fmt: skip
    return grad_x, grad_y, grad_gate, grad_scale, grad_shift


_both_backward_op = register(
    "gate_residual_norm_modulate_backward(Tensor grad_residual, Tensor grad_out, Tensor residual, Tensor y,"
    f" Tensor gate, Tensor scale, {_PLACE}, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _both_backward,
    lambda grad_residual, grad_out, residual, y, gate, scale, *_: tuple(
        t.new_empty(t.shape) for t in (residual, y, gate, scale, scale)
    ),
)


def _both_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, scale, _, *ctx.options, _ = inputs
    ctx.save_for_backward(output[0], y, gate, scale)


def _both_autograd(ctx: Any, grad_residual: Tensor, grad_out: Tensor) -> tuple[Any, ...]:
    grads = _both_backward_op(grad_residual, grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


gate_residual_norm_modulate_op = register(
    "gate_residual_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift,"
    f" {_PLACE}, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    _both,
    lambda x, y, gate, scale, shift, per_group, ends, token_offset, eps, dtype: (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=dtype),
    ),
    _both_autograd,
    _both_setup,
)
gate_residual_norm_modulate_out_op = register(
    "gate_residual_norm_modulate_out(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift,"
    f" {_PLACE}, float eps, Tensor(a!) residual, Tensor(b!) out) -> ()",
    _both_out,
    lambda *_: None,
)
