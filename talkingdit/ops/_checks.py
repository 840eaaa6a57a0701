# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the ops. Every message names the op, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def check_dims(op: str, name: str, value: Tensor, axes: str) -> None:
    """``axes`` names the dimensions: ``check_dims("rope3d", "x", x, "B, N, H, D")``."""
    check_tensor(op, name, value)
    count = axes.count(",") + 1
    if value.dim() != count:
        raise ValueError(f"{op}: {name} must have {count} dimensions [{axes}], got shape {tuple(value.shape)}")


def check_shape(op: str, name: str, value: Tensor, shape: Sequence[int], axes: str) -> None:
    check_dims(op, name, value, axes)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape [{axes}] = {tuple(shape)}, got {tuple(value.shape)}")


def check_float(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {value.dtype}")


def check_same(op: str, name: str, value: Tensor, other_name: str, other: Tensor, dtype: bool = True) -> None:
    """Same device, and with ``dtype`` the same dtype, as another argument."""
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name} ({other.device}), got {value.device}")
    if dtype and value.dtype != other.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {other_name} ({other.dtype}), got {value.dtype}")


def check_out(op: str, out: Tensor, shape: Sequence[int], dtype: torch.dtype, inputs: Sequence[Tensor]) -> None:
    """Checks a preallocated result. Writing into it is invisible to autograd, so no input may need a gradient."""
    check_tensor(op, "out", out)
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype:
        raise ValueError(f"{op}: out must be {dtype} of shape {tuple(shape)}, got {out.dtype} {tuple(out.shape)}")
    if out.dim() and out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"{op}: out must be contiguous on its last axis, got strides {out.stride()}")
    if out.device != inputs[0].device:
        raise ValueError(f"{op}: out must be on {inputs[0].device}, got {out.device}")
    if torch.is_grad_enabled() and (out.requires_grad or any(t.requires_grad for t in inputs)):
        raise RuntimeError(f"{op}: out= has no gradient; call it under torch.no_grad() or leave out= away")


def rows(value: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous (all that kernels ask for), else a contiguous copy."""
    return value if value.shape[-1] <= 1 or value.stride(-1) == 1 else value.contiguous()
