# SPDX-License-Identifier: Apache-2.0
"""Linear layers in eight bits: rows of activations and of weights as codes with one scale each, and their product.

A row is ``scale * codes``: int8 codes up to 127, or float8 (e4m3) up to 448, the largest magnitude of the row at the
top. Rows are made in the same pass over memory as what comes before them: a norm, a gated sum with a norm, an
activation.

Two contracts, for everything that makes rows of something computed:

- ``"exact"``: to the bit the rows of the unfused ops. The norm (or activation) is computed in float32, rounded to the
  type that layers have, and that is quantised.
- ``"close"``: without the rounding in between. Within half a step of the codes of the true value, which the exact rows
  are not; the two differ by one step of a code at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.ops import modulate
from talkingdit.ops._checks import check_dims, check_same, check_shape
from talkingdit.ops._eight_bit_library import KINDS, both_op, both_out_op, linear_op, norm_op, quantise_rows_op
from talkingdit.ops.gelu_tanh import gelu_tanh

__all__ = [
    "EightBitRows",
    "eight_bit_linear",
    "eight_bit_linear_reference",
    "gate_residual_norm_modulate_eight_bit",
    "gate_residual_norm_modulate_eight_bit_reference",
    "norm_modulate_eight_bit",
    "norm_modulate_eight_bit_reference",
    "quantise_rows",
    "quantise_rows_reference",
]

MOST = {"int8": 127.0, "fp8": 448.0}
CONTRACTS = ("exact", "close")
_LAYERS = (torch.float32, torch.bfloat16, torch.float16)
_LEAST = 1e-30  # a row of smaller numbers is scaled as if this were its largest
_MAX_DIM = 1 << 16


class EightBitRows(NamedTuple):
    """Rows of numbers, ``scale * codes``."""

    codes: Tensor  # [..., K] int8 or float8_e4m3fn
    scale: Tensor  # [...] float32
    dtype: torch.dtype  # of the numbers, and of what layers make of them

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def narrow(self, begin: int, end: int) -> EightBitRows:
        """The rows ``[:, begin:end]``."""
        return EightBitRows(self.codes[:, begin:end], self.scale[:, begin:end], self.dtype)

    def wide(self) -> Tensor:
        """The numbers, float32."""
        return self.codes.float() * self.scale[..., None]


# ---- public ----------------------------------------------------------------------------------------------------------


def _check_how(op: str, kind: str, contract: str, *inputs: Tensor) -> None:
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if contract not in CONTRACTS:
        raise ValueError(f"{op}: contract must be one of {', '.join(CONTRACTS)}, got {contract!r}")
    for value in inputs:
        if value.dtype not in _LAYERS:
            raise TypeError(f"{op}: tensors must be float32, bfloat16 or float16, got {value.dtype}")
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        raise RuntimeError(f"{op}: rounding to eight bits has no gradient; call it under torch.no_grad()")


def quantise_rows(x: Tensor, kind: str, activation: str | None = None, contract: str = "exact") -> EightBitRows:
    """Rows in eight bits, of a tensor or of an activation of it.

    Args:
        x: [..., K] float32, bfloat16 or float16, K at most 65,536.
        kind: "int8" or "fp8".
        activation: None, or "gelu_tanh", the op of that name.
        contract: of the activation, see above.

    Raises:
        TypeError, ValueError: a dtype, name or size that does not fit.
        RuntimeError: x needs a gradient.
    """
    op = "quantise_rows"
    _check_how(op, kind, contract, x)
    if activation not in (None, "gelu_tanh"):
        raise ValueError(f"{op}: activation must be None or 'gelu_tanh', got {activation!r}")
    if x.dim() < 1 or x.shape[-1] > _MAX_DIM:
        raise ValueError(f"{op}: x must have rows of at most {_MAX_DIM}, got shape {tuple(x.shape)}")
    flat = x.reshape(-1, x.shape[-1])
    codes, scale = quantise_rows_op(flat, kind, activation is not None, contract == "exact")
    return EightBitRows(codes.view(x.shape), scale.view(x.shape[:-1]), x.dtype)


def norm_modulate_eight_bit(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    kind: str,
    groups: modulate.Groups = None,
    eps: float = 1e-6,
    token_offset: int = 0,
    dtype: torch.dtype | None = None,
    contract: str = "exact",
) -> EightBitRows:
    """:func:`talkingdit.ops.norm_modulate` of x [B, N, dim] in eight bits.

    Args:
        x, scale, shift, groups, eps, token_offset: as there; not float64.
        kind: "int8" or "fp8".
        dtype: that layers have; that of x unless given.
        contract: see above.

    Raises:
        TypeError, ValueError, RuntimeError: as there, and for what :func:`quantise_rows` refuses.
    """
    op = "norm_modulate_eight_bit"
    modulate._check_rows(op, x)
    dtype = dtype or x.dtype
    _check_how(op, kind, contract, x, x.new_empty(0, dtype=dtype), scale, shift)
    wide = modulate._modulations(op, x, scale=scale, shift=shift)
    place = modulate._place(op, x, groups, scale.shape[1], token_offset)
    codes, scales = norm_op(x, *wide, *place, eps, kind, contract == "exact", dtype)
    return EightBitRows(codes, scales, dtype)


def gate_residual_norm_modulate_eight_bit(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    kind: str,
    groups: modulate.Groups = None,
    eps: float = 1e-6,
    token_offset: int = 0,
    contract: str = "exact",
    out: Tensor | None = None,
) -> tuple[Tensor, EightBitRows]:
    """:func:`talkingdit.ops.gate_residual_norm_modulate`, its second result in eight bits.

    Args:
        x, y, gate, scale, shift, groups, eps, token_offset: as there; not float64. Layers have the dtype of y.
        kind: "int8" or "fp8".
        contract: see above.
        out: preallocated residual, may be ``x``.

    Raises:
        TypeError, ValueError, RuntimeError: as there, and for what :func:`quantise_rows` refuses.
    """
    op = "gate_residual_norm_modulate_eight_bit"
    modulate._check_rows(op, x, y)
    _check_how(op, kind, contract, x, y, gate, scale, shift)
    wide = modulate._modulations(op, x, gate=gate, scale=scale, shift=shift)
    place = modulate._place(op, x, groups, gate.shape[1], token_offset)
    how = (*place, eps, kind, contract == "exact")
    if out is None:
        residual, codes, scales = both_op(x, y, *wide, *how)
    else:
        modulate.check_out(op, out, x.shape, x.dtype, [x, y, gate, scale, shift])
        residual, (codes, scales) = out, both_out_op(x, y, *wide, *how, out)
    return residual, EightBitRows(codes, scales, y.dtype)


def eight_bit_linear(x: EightBitRows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` of rows in eight bits, sums exact (int8) or in float32 (float8), rounded once.

    On CUDA float8 is ``torch._scaled_mm`` (compute capability 8.9 and up, bfloat16 results), int8 ``torch._int_mm``.
    Sizes or devices that they do not take are multiplied in float32.

    Args:
        x: [..., K].
        weight: [N, K] codes of the same kind.
        weight_scale: [N] float32.
        bias: [N], any floating dtype.

    Returns:
        [..., N] in ``x.dtype``.

    Raises:
        TypeError, ValueError: codes of another kind, or shapes that do not fit.
    """
    op = "eight_bit_linear"
    check_dims(op, "weight", weight, "N, K")
    check_same(op, "weight", weight, "x", x.codes)
    check_shape(op, "weight", weight, (len(weight), x.codes.shape[-1]), "N, K")
    check_shape(op, "weight_scale", weight_scale, (len(weight),), "N")
    if x.codes.dtype not in KINDS.values():
        raise TypeError(f"{op}: codes must be int8 or float8_e4m3fn, got {x.codes.dtype}")
    if bias is not None:
        check_shape(op, "bias", bias, (len(weight),), "N")
        bias = bias.detach()
    out = linear_op(
        x.codes.reshape(-1, x.codes.shape[-1]), x.scale.reshape(-1), weight, weight_scale.float(), bias, x.dtype
    )
    return out.view(*x.codes.shape[:-1], len(weight))


# ---- references ------------------------------------------------------------------------------------------------------


def quantise_rows_reference(
    x: Tensor, kind: str, activation: str | None = None, contract: str = "exact"
) -> EightBitRows:
    """:func:`quantise_rows` in plain PyTorch."""
    dtype = x.dtype
    if activation is not None:
        x = gelu_tanh(x if contract == "exact" else x.float())
    wide, most = x.float(), MOST[kind]
    largest = wide.abs().amax(-1).clamp(min=_LEAST)
    factor = torch.full_like(largest, most) / largest  # `most / largest` would be rounded twice
    codes = wide * factor[..., None]
    codes = (codes.round() if kind == "int8" else codes).clamp(-most, most)
    return EightBitRows(codes.to(KINDS[kind]), largest / most, dtype)


def norm_modulate_eight_bit_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    kind: str,
    groups: modulate.Groups = None,
    eps: float = 1e-6,
    token_offset: int = 0,
    dtype: torch.dtype | None = None,
    contract: str = "exact",
) -> EightBitRows:
    """:func:`norm_modulate_eight_bit` in plain PyTorch."""
    dtype = dtype or x.dtype
    through = dtype if contract == "exact" else torch.float32
    normal = modulate.norm_modulate_reference(x.float(), scale, shift, groups, eps, token_offset, through)
    return quantise_rows_reference(normal, kind)._replace(dtype=dtype)


def gate_residual_norm_modulate_eight_bit_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    kind: str,
    groups: modulate.Groups = None,
    eps: float = 1e-6,
    token_offset: int = 0,
    contract: str = "exact",
) -> tuple[Tensor, EightBitRows]:
    """:func:`gate_residual_norm_modulate_eight_bit` in plain PyTorch."""
    stream = modulate.gate_residual_reference(x.float(), y, gate, groups, token_offset)
    normal = norm_modulate_eight_bit_reference(stream, scale, shift, kind, groups, eps, token_offset, y.dtype, contract)
    return stream.to(x.dtype), normal


def eight_bit_linear_reference(
    x: EightBitRows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """:func:`eight_bit_linear` in plain PyTorch, in float64."""
    wide = x.codes.float().double() * x.scale[..., None].double()
    return F.linear(
        wide, weight.float().double() * weight_scale[:, None].double(), None if bias is None else bias.double()
    ).to(x.dtype)
