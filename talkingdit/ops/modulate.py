# SPDX-License-Identifier: Apache-2.0
"""Normalise, modulate, gate: what surrounds attention and feed-forward in a diffusion transformer (arXiv:2212.09748).

Tokens come in groups that share one row of scale, shift and gate: noisy tokens at time t and clean ones at time 0,
one group per frame, or one for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.ops import _modulate_library as library
from talkingdit.ops._checks import check_dims, check_float, check_out, check_same, check_shape

__all__ = [
    "gate_residual",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_reference",
    "gate_residual_reference",
    "norm_modulate",
    "norm_modulate_reference",
]

Groups = int | Sequence[int] | None
_MAX_DIM, _MAX_RANGES = 16384, 128

# ---- public --------------------------------------------------------------------------------------------------------


def _place(op: str, x: Tensor, groups: Groups, count: int, token_offset: int) -> tuple[int, list[int], int]:
    """(tokens per group or 0, ends otherwise, token_offset), checked against ``count`` rows of modulation."""
    tokens = x.shape[1]
    if token_offset < 0:
        raise ValueError(f"{op}: token_offset must not be negative, got {token_offset}")
    if groups is None:
        groups = [token_offset + tokens]
    if isinstance(groups, int | torch.SymInt):
        if groups < 1:
            raise ValueError(f"{op}: groups must be a positive number of tokens or a list of ends, got {groups}")
        per_group, ends, last = groups, [], groups * count
    else:
        per_group, ends = 0, [end if isinstance(end, torch.SymInt) else int(end) for end in groups]
        if not 0 < len(ends) <= _MAX_RANGES or any(b < a for a, b in zip([0, *ends], ends, strict=False)):
            raise ValueError(
                f"{op}: groups must be 1 to {_MAX_RANGES} token indices that do not decrease, got {list(groups)}"
            )
        if len(ends) != count:
            raise ValueError(f"{op}: {len(ends)} groups need {len(ends)} rows of modulation, got {count}")
        last = ends[-1]
    if token_offset + tokens > last:
        raise ValueError(
            f"{op}: tokens must lie inside the groups, which end at {last}, "
            f"got tokens {token_offset} to {token_offset + tokens}"
        )
    return per_group, ends, token_offset


def _check_rows(op: str, x: Tensor, y: Tensor | None = None) -> None:
    check_dims(op, "x", x, "B, N, dim")
    check_float(op, "x", x)
    if not 1 <= x.shape[2] <= _MAX_DIM:
        raise ValueError(f"{op}: dim must be 1 to {_MAX_DIM}, got {x.shape[2]}")
    if y is None:
        return
    check_shape(op, "y", y, x.shape, "B, N, dim")
    check_float(op, "y", y)
    check_same(op, "y", y, "x", x, dtype=False)
    if (x.dtype == torch.float64) != (y.dtype == torch.float64):
        raise TypeError(f"{op}: x and y must both be float64 or neither, got {x.dtype} and {y.dtype}")


def _modulations(op: str, x: Tensor, **given: Tensor) -> list[Tensor]:
    """Modulations [B, G, dim] in the arithmetic type, a batch of one expanded."""
    first = next(iter(given.values()))
    result = []
    for name, value in given.items():
        check_dims(op, name, value, "B, G, dim")
        check_float(op, name, value)
        check_same(op, name, value, "x", x, dtype=False)
        if value.shape[2] != x.shape[2] or value.shape[0] not in (1, x.shape[0]) or value.shape[1] != first.shape[1]:
            expected = (x.shape[0], first.shape[1], x.shape[2])
            raise ValueError(f"{op}: {name} must have shape [B, G, dim] = {expected}, got {tuple(value.shape)}")
        wide = value.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        result.append(wide.expand(x.shape[0], -1, -1))
    return result


def _out_dtype(op: str, x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    dtype = dtype or x.dtype
    if not dtype.is_floating_point or (dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(f"{op}: dtype must be floating, and float64 only for float64 x ({x.dtype}), got {dtype}")
    return dtype


def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    groups: Groups = None,
    eps: float = 1e-6,
    token_offset: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``layer_norm(x) * (1 + scale) + shift``, without affine weights, scale and shift chosen by the token's group.

    Arithmetic is float32 (float64 for float64 x) and rounds once. Gradients of scale and shift have a fixed order
    of addition.

    Args:
        x: [B, N, dim], any floating dtype, any strides on the first two axes.
        scale, shift: [B, G, dim] (or a batch of one), any floating dtype.
        groups: tokens per group, or the ends of the G groups in the unsharded sequence, or None: one group.
        eps: added to the variance.
        token_offset: place of ``x[:, 0]`` in the unsharded sequence.
        dtype: of the result; that of x unless given (a float32 residual stream can feed bfloat16 layers).
        out: preallocated result; inference only.

    Returns:
        [B, N, dim].

    Raises:
        TypeError, ValueError: dtypes, shapes, groups or token range do not fit.
        RuntimeError: ``out`` was given while a gradient is needed.
    """
    op = "norm_modulate"
    _check_rows(op, x)
    wide_scale, wide_shift = _modulations(op, x, scale=scale, shift=shift)
    place = _place(op, x, groups, scale.shape[1], token_offset)
    if out is None:
        return library.norm_modulate_op(x, wide_scale, wide_shift, *place, eps, _out_dtype(op, x, dtype))
    check_out(op, out, x.shape, _out_dtype(op, x, dtype or out.dtype), [x, scale, shift])
    library.norm_modulate_out_op(x, wide_scale, wide_shift, *place, eps, out)
    return out


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    groups: Groups = None,
    token_offset: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """``x + gate * y``, the gate chosen by the token's group.

    Args:
        x: residual stream [B, N, dim].
        y: [B, N, dim], any floating dtype (float64 exactly if x is).
        gate: [B, G, dim] (or a batch of one), any floating dtype.
        groups, token_offset: as in :func:`norm_modulate`.
        out: preallocated result, may be ``x``; inference only.

    Returns:
        [B, N, dim] in the dtype of x.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`norm_modulate`.
    """
    op = "gate_residual"
    _check_rows(op, x, y)
    (wide_gate,) = _modulations(op, x, gate=gate)
    place = _place(op, x, groups, gate.shape[1], token_offset)
    if out is None:
        return library.gate_residual_op(x, y, wide_gate, *place)
    check_out(op, out, x.shape, x.dtype, [x, y, gate])
    library.gate_residual_out_op(x, y, wide_gate, *place, out)
    return out


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    groups: Groups = None,
    eps: float = 1e-6,
    token_offset: int = 0,
    dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`gate_residual` and :func:`norm_modulate` of its result, in one pass over memory.

    Args:
        x, y, gate, scale, shift, groups, eps, token_offset: as in the two functions.
        dtype: of the modulated result; that of x unless given.
        out: preallocated (residual, modulated); residual may be ``x``; inference only.

    Returns:
        ``x + gate * y`` in the dtype of x, and its modulated norm (taken before the former is rounded).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`norm_modulate`.
    """
    op = "gate_residual_norm_modulate"
    _check_rows(op, x, y)
    wide = _modulations(op, x, gate=gate, scale=scale, shift=shift)
    place = _place(op, x, groups, gate.shape[1], token_offset)
    if out is None:
        return library.gate_residual_norm_modulate_op(x, y, *wide, *place, eps, _out_dtype(op, x, dtype))
    residual, modulated = out
    check_out(op, residual, x.shape, x.dtype, [x, y, gate, scale, shift])
    check_out(op, modulated, x.shape, _out_dtype(op, x, dtype or modulated.dtype), [x, y, gate, scale, shift])
    library.gate_residual_norm_modulate_out_op(x, y, *wide, *place, eps, residual, modulated)
    return residual, modulated


# ---- references ----------------------------------------------------------------------------------------------------


def _per_token(modulation: Tensor, x: Tensor, groups: Groups, token_offset: int) -> Tensor:
    """[B, G, dim] -> [B, N, dim]."""
    tokens = torch.arange(token_offset, token_offset + x.shape[1], device=x.device)
    if groups is None:
        index = torch.zeros_like(tokens)
    elif isinstance(groups, int):
        index = tokens // groups
    else:
        index = torch.bucketize(tokens, torch.tensor(list(groups), device=x.device), right=True)
    return modulation[:, index].to(torch.promote_types(x.dtype, torch.float32))


def norm_modulate_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    groups: Groups = None,
    eps: float = 1e-6,
    token_offset: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`norm_modulate` in plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = F.layer_norm(wide, (x.shape[-1],), eps=eps)
    result = normal * (1 + _per_token(scale, x, groups, token_offset)) + _per_token(shift, x, groups, token_offset)
    return result.to(dtype or x.dtype)


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor, groups: Groups = None, token_offset: int = 0) -> Tensor:
    """:func:`gate_residual` in plain PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + _per_token(gate, x, groups, token_offset) * y.to(wide)).to(x.dtype)


def gate_residual_norm_modulate_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    groups: Groups = None,
    eps: float = 1e-6,
    token_offset: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`gate_residual_norm_modulate` in plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    residual = gate_residual_reference(wide, y, gate, groups, token_offset)
    modulated = norm_modulate_reference(residual, scale, shift, groups, eps, token_offset)
    return residual.to(x.dtype), modulated.to(dtype or x.dtype)
