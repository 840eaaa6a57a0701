# SPDX-License-Identifier: Apache-2.0
"""GELU in the form with tanh, by a kernel of its own on CPUs: PyTorch's takes five times as long as its GELU with erf.

On GPUs, where PyTorch's is as fast as memory, in float64 and in compiled graphs, which fuse it, it is PyTorch's.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit._native_loader import native as _native  # not `native`: there is no CUDA kernel to be emulated
from talkingdit.ops._checks import check_float
from talkingdit.ops._library import register
from talkingdit.ops._memory import empty

__all__ = ["gelu_tanh", "gelu_tanh_reference", "overwrite_with_gelu_tanh"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """All as [rows, dim], one row where all are contiguous. The last one is written to, and must be contiguous."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    *given, result = tensors
    found = [t.reshape(-1, t.shape[-1]) for t in given]
    return [*(t if t.stride(-1) == 1 else t.contiguous() for t in found), result.view(-1, result.shape[-1])]


def _run(x: Tensor) -> Tensor:
    out = empty(x.shape, x)
    given, result = _rows(x, out)
    _native.gelu_tanh(given, None, result)
    return out


def _run_backward(grad: Tensor, x: Tensor) -> Tensor:
    out = empty(x.shape, x)
    gradient, given, result = _rows(grad, x, out)
    _native.gelu_tanh(given, gradient, result)
    return out


def _overwrite(x: Tensor) -> None:
    if x.is_contiguous() or (x.stride(-1) == 1 and _has_one_stride(x)):
        rows = x.view(1, -1) if x.is_contiguous() else x.view(-1, x.shape[-1])
        _native.gelu_tanh(rows, None, rows)
    else:
        x.copy_(_run(x))


def _own(x: Tensor) -> bool:
    """Is it for the kernel? Else the public functions call PyTorch's."""
    return x.device.type == "cpu" and x.dtype in _DTYPES


def _has_one_stride(x: Tensor) -> bool:
    """Do the rows of x [..., dim] follow each other with one stride?"""
    outer = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    return all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(outer))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_backward_op = register(
    "gelu_tanh_backward(Tensor grad, Tensor x) -> Tensor", _run_backward, lambda grad, x: x.new_empty(x.shape)
)
_op = register(
    "gelu_tanh(Tensor x) -> Tensor",
    _run,
    lambda x: x.new_empty(x.shape),
    lambda ctx, grad: _backward_op(grad, *ctx.saved_tensors),
    _setup,
)
_overwriting_op = register("gelu_tanh_(Tensor(a!) x) -> ()", _overwrite, lambda x: None)


def gelu_tanh(x: Tensor) -> Tensor:
    """``F.gelu(x, approximate="tanh")``, computed in float32 (float64 for float64) and rounded once.

    Args:
        x: floating, any shape.

    Returns:
        The shape and dtype of x.

    Raises:
        TypeError: x is not floating.
    """
    check_float("gelu_tanh", "x", x)
    if not _own(x) or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return _op(x)


def overwrite_with_gelu_tanh(x: Tensor) -> Tensor:
    """:func:`gelu_tanh` of x, to the bit, written over x; for inference, it has no gradient.

    Args:
        x: floating, any shape and strides.

    Returns:
        x.
    """
    if _own(x):
        _overwriting_op(x)
    else:
        torch.ops.aten.gelu_.default(x, approximate="tanh")
    return x


def gelu_tanh_reference(x: Tensor) -> Tensor:
    """:func:`gelu_tanh` in plain PyTorch."""
    return F.gelu(x, approximate="tanh")
