# SPDX-License-Identifier: Apache-2.0
"""A linear layer and the GELU behind it, as two passes or as one product, for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.ops import _matrix_kernels as matrix_kernels
from talkingdit.ops._checks import check_dims, check_float, check_same, check_shape, check_tensor
from talkingdit.ops._library import register
from talkingdit.ops.gelu_tanh import overwrite_with_gelu_tanh

__all__ = ["linear_gelu"]

KERNELS = ("auto", "general", "epilogue")


def _two_passes(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product, and GELU over it in place."""
    return overwrite_with_gelu_tanh(F.linear(x, weight, bias))


def _one_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # On CPUs `_addmm_activation` computes the other GELU, that with erf.
    if not x.is_cuda:
        return _two_passes(x, weight, bias)
    return torch._addmm_activation(bias, x, weight.T, use_gelu=True)


_op = register(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    _one_product,
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)


def _fuses(x: Tensor, weight: Tensor, kernel: str) -> bool:
    if kernel == "general" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if kernel == "epilogue":
        return True
    columns, inner = weight.shape
    return x.is_cuda and any(
        rule.holds("linear_gelu", inner, columns, x.element_size()) for rule in matrix_kernels.MEASURED
    )


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_dims(op, "x", x, "M, K")
    check_float(op, "x", x)
    check_tensor(op, "weight", weight)
    check_shape(op, "weight", weight, (*weight.shape[:1], x.shape[1]), "N, K")
    check_same(op, "weight", weight, "x", x)
    check_shape(op, "bias", bias, weight.shape[:1], "N")
    check_same(op, "bias", bias, "x", x)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, kernel: str = "auto") -> Tensor:
    """``gelu(x @ weight.T + bias)``, GELU in the form with tanh, for inference.

    Args:
        x: [M, K].
        weight: [N, K], dtype of x.
        bias: [N], dtype of x.
        kernel: "general" is the product and :func:`gelu_tanh` over its result, in place, bit for bit.
            "epilogue" is one product in bfloat16 and float16 on a GPU, cuBLASLt's, whose sums GELU is taken of before
            they are rounded; other dtypes and devices go the general way. "auto" takes the epilogue where
            a measurement says so, and the general way everywhere else.

    Returns:
        [M, N] in the dtype of x.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or the name of the kernel do not fit.
        RuntimeError: a gradient is needed.
    """
    op = "linear_gelu"
    _check(op, x, weight, bias)
    if kernel not in KERNELS:
        raise ValueError(f"{op}: kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        raise RuntimeError(f"{op}: it has no gradient; call it under torch.no_grad()")
    return _op(x, weight, bias) if _fuses(x, weight, kernel) else _two_passes(x, weight, bias)
