# SPDX-License-Identifier: Apache-2.0
"""Rows times a number: the smallest op that has everything an op has."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from talkingdit._native_loader import native
from talkingdit.ops._checks import check_dims, check_float, check_out, rows
from talkingdit.ops._library import register
from talkingdit.ops._memory import empty

__all__ = ["scale_rows", "scale_rows_reference"]


def _scale_rows_out(x: Tensor, factor: float, out: Tensor) -> None:
    native.scale_rows(rows(x), out, factor)


def _scale_rows(x: Tensor, factor: float) -> Tensor:
    out = empty(x.shape, x)
    _scale_rows_out(x, factor, out)
    return out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.factor = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _op(grad, ctx.factor), None


_op = register(
    "scale_rows(Tensor x, float factor) -> Tensor", _scale_rows, lambda x, _: x.new_empty(x.shape), _backward, _setup
)
_op_out = register("scale_rows_out(Tensor x, float factor, Tensor(a!) out) -> ()", _scale_rows_out, lambda *_: None)


def scale_rows(x: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """``factor * x``.

    Args:
        x: [N, dim] float32, float64, bfloat16 or float16; any stride on the first axis.
        out: preallocated result; inference only.

    Returns:
        [N, dim] in the dtype of x.

    Raises:
        TypeError, ValueError: dtype or shape do not fit.
        RuntimeError: ``out`` was given while a gradient is needed.
    """
    op = "scale_rows"
    check_dims(op, "x", x, "N, dim")
    check_float(op, "x", x)
    if out is None:
        return _op(x, factor)
    check_out(op, out, x.shape, x.dtype, [x])
    _op_out(x, factor, out)
    return out


def scale_rows_reference(x: Tensor, factor: float) -> Tensor:
    """:func:`scale_rows` in plain PyTorch."""
    return factor * x
