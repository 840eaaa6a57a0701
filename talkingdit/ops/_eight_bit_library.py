# SPDX-License-Identifier: Apache-2.0
"""The registered ops behind :mod:`talkingdit.ops.eight_bit`, and what multiplies codes on which device.

Shapes as in :mod:`talkingdit.ops._modulate_library`; codes [..., K] with scales [...] float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit._native_loader import native
from talkingdit.ops._checks import rows
from talkingdit.ops._library import register
from talkingdit.ops._memory import empty

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SUMS = 1 << 27  # bytes of int32 sums of a product that there are at once


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def codes_for(shape: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for rows [..., K]: codes as bytes, and scales."""
    return empty(shape, like, torch.uint8), empty(shape[:-1], like, torch.float32)


def _fake_rows(shape: Any, kind: str, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_empty(shape, dtype=KINDS[kind]), like.new_empty(shape[:-1], dtype=torch.float32)


def _quantise(x: Tensor, kind: str, gelu: bool, exact: bool) -> tuple[Tensor, Tensor]:
    codes, scale = codes_for(x.shape, x)
    native.quantise_rows(rows(x), codes[None], scale[None], kind, gelu, exact)
    return codes.view(KINDS[kind]), scale


quantise_rows_op = register(
    "quantise_rows(Tensor x, str kind, bool gelu, bool exact) -> (Tensor, Tensor)",
    _quantise,
    lambda x, kind, gelu, exact: _fake_rows(x.shape, kind, x),
)

_PLACE = "SymInt per_group, SymInt[] ends, SymInt token_offset, float eps"
_HOW = "str kind, bool exact, ScalarType dtype"


def _norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    per_group: int,
    ends: list[int],
    token_offset: int,
    eps: float,
    kind: str,
    exact: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    codes, scales = codes_for(x.shape, x)
    native.modulate_eight_bit(
        rows(x), None, None, rows(scale), rows(shift), None, codes, scales, kind, exact, _name(dtype),
        per_group, ends, token_offset, eps,
    )  # fmt: skip
    return codes.view(KINDS[kind]), scales


norm_op = register(
    f"norm_modulate_eight_bit(Tensor x, Tensor scale, Tensor shift, {_PLACE}, {_HOW}) -> (Tensor, Tensor)",
    _norm,
    lambda x, scale, shift, per_group, ends, token_offset, eps, kind, exact, dtype: _fake_rows(x.shape, kind, x),
)


def _both_into(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    per_group: int,
    ends: list[int],
    token_offset: int,
    eps: float,
    kind: str,
    exact: bool,
    residual: Tensor,
) -> tuple[Tensor, Tensor]:
    codes, scales = codes_for(x.shape, x)
    native.modulate_eight_bit(
        rows(x), rows(y), rows(gate), rows(scale), rows(shift), residual, codes, scales, kind, exact, _name(y.dtype),
        per_group, ends, token_offset, eps,
    )  # fmt: skip
    return codes.view(KINDS[kind]), scales


def _both(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    residual = empty(x.shape, x)
    given: tuple[Any, ...] = (x, *others, residual)
    codes, scales = _both_into(*given)
    return residual, codes, scales


_STREAM = "Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift"
both_op = register(
    f"gate_residual_norm_modulate_eight_bit({_STREAM}, {_PLACE}, str kind, bool exact) -> (Tensor, Tensor, Tensor)",
    _both,
    lambda x, y, gate, scale, shift, per_group, ends, token_offset, eps, kind, exact: (
        x.new_empty(x.shape),
        *_fake_rows(x.shape, kind, x),
    ),
)
both_out_op = register(
    f"gate_residual_norm_modulate_eight_bit_out({_STREAM}, {_PLACE}, str kind, bool exact, Tensor(a!) residual)"
    " -> (Tensor, Tensor)",
    _both_into,
    lambda x, y, gate, scale, shift, per_group, ends, token_offset, eps, kind, exact, residual: _fake_rows(
        x.shape, kind, x
    ),
)


def _linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if codes.dtype == torch.float8_e4m3fn and _float8_product(codes, weight):
        narrow = None if bias is None else bias.to(torch.bfloat16)
        out = torch._scaled_mm(
            codes, weight.t(), scale_a=scale[:, None], scale_b=weight_scale[None], bias=narrow, out_dtype=torch.bfloat16
        )
        return out.to(dtype)
    if codes.dtype == torch.int8 and (codes.is_cpu or _int8_product(codes, weight)):
        out = empty((len(codes), len(weight)), scale, dtype)
        bias = None if bias is None else bias.float()
        step = max(1024, SUMS // (4 * max(1, len(weight))))
        for begin in range(0, len(codes), step):
            part = slice(begin, begin + step)
            native.rescale(_sums(codes[part], weight), scale[part], weight_scale, bias, out[part])
        return out
    # Where there is no product of eight bits it is made in float32, whose products of two codes are exact.
    product = codes.float() @ weight.float().t()
    product *= scale[:, None]
    product *= weight_scale
    if bias is not None:
        product += bias
    return product.to(dtype)


linear_op = register(
    "eight_bit_linear(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype)"
    " -> Tensor",
    _linear,
    lambda codes, scale, weight, weight_scale, bias, dtype: scale.new_empty(len(codes), len(weight), dtype=dtype),
)


def _sums(codes: Tensor, weight: Tensor) -> Tensor:
    """codes weight^T, int32."""
    few = max(0, 32 - len(codes)) if codes.is_cuda else 0  # the library's product asks for more than 16 rows
    return torch._int_mm(F.pad(codes, (0, 0, 0, few)) if few else codes, weight.t())[: len(codes)]


def _float8_product(codes: Tensor, weight: Tensor) -> bool:
    """Has the GPU one with scales of rows? On the CPU PyTorch's is slower than one in float32."""
    pieces = not (codes.shape[1] % 16 or weight.shape[0] % 16)
    return codes.is_cuda and pieces and torch.cuda.get_device_capability(codes.device) >= (8, 9)


def _int8_product(codes: Tensor, weight: Tensor) -> bool:
    return not (codes.shape[1] % 8 or weight.shape[0] % 8)
