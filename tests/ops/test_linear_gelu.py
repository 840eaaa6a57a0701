# SPDX-License-Identifier: Apache-2.0
"""linear_gelu against two layers, bit by bit, and on a GPU against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit import ops
from talkingdit.ops import _matrix_kernels
from talkingdit.ops.linear_gelu import KERNELS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(dtype: torch.dtype, rows: int = 37, inner: int = 24, columns: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, inner), (columns, inner), (columns,))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_on_cpus_it_is_the_two_layers_bit_by_bit(rows: int, kernel: str, dtype: torch.dtype) -> None:
    """And not `torch._addmm_activation`, whose GELU is the one with erf there."""
    x, weight, bias = draw(dtype, rows)
    want = ops.gelu_tanh(F.linear(x, weight, bias))
    assert torch.equal(ops.linear_gelu(x, weight, bias, kernel=kernel), want)


def test_the_registered_op_has_the_shapes_it_says() -> None:
    torch.library.opcheck(torch.ops.talkingdit.linear_gelu.default, tuple(draw(torch.bfloat16)))


def test_a_gradient_is_refused() -> None:
    x, weight, bias = (t.requires_grad_() for t in draw(torch.float64, 3, 4, 5))
    with pytest.raises(RuntimeError, match="linear_gelu: it has no gradient"):
        ops.linear_gelu(x, weight, bias)


def test_wrong_arguments_are_named() -> None:
    x, weight, bias = draw(torch.float32)
    with pytest.raises(ValueError, match=r"linear_gelu: weight must have shape \[N, K\] = \(40, 24\), got \(40, 23\)"):
        ops.linear_gelu(x, weight[:, 1:], bias)
    with pytest.raises(ValueError, match=r"linear_gelu: bias must have shape \[N\] = \(40,\), got \(39,\)"):
        ops.linear_gelu(x, weight, bias[1:])
    with pytest.raises(ValueError, match=r"linear_gelu: x must have 2 dimensions \[M, K\], got shape \(1, 37, 24\)"):
        ops.linear_gelu(x[None], weight, bias)
    with pytest.raises(TypeError, match="linear_gelu: weight must have the dtype of x"):
        ops.linear_gelu(x, weight.double(), bias)
    with pytest.raises(ValueError, match="linear_gelu: kernel must be one of auto, general, epilogue, got 'cutlass'"):
        ops.linear_gelu(x, weight, bias, kernel="cutlass")


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", [(300, 128, 256), (1, 64, 40), (130, 72, 333)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_cuda_kernels_agree_with_float64(
    kernel: str, dtype: torch.dtype, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the rounding of the result (of both results, the general way). GELU with erf would be off by 5e-4."""
    given = draw(dtype, *sizes)
    truth = F.gelu(F.linear(*(t.double() for t in given)), approximate="tanh")
    x, weight, bias = (t.cuda() for t in given)
    out = ops.linear_gelu(x, weight, bias, kernel=kernel)
    bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]
    assert float((out.double().cpu() - truth).norm() / truth.norm()) < bound
    if kernel == "epilogue":
        rule = _matrix_kernels.Measured("linear_gelu", (sizes[1], sizes[1] + 1), (sizes[2], sizes[2] + 1))
        monkeypatch.setattr(_matrix_kernels, "MEASURED", (rule,))
        assert torch.equal(ops.linear_gelu(x, weight, bias), out)


@pytest.mark.cuda
def test_the_epilogue_takes_the_gelu_with_tanh_of_unrounded_sums() -> None:
    """float16 at values where both forms are farthest apart: nearer to the one with tanh than to the one with erf."""
    weight = torch.eye(64, dtype=torch.float16, device="cuda")
    x = torch.linspace(-2.6, -1.8, 4096, device="cuda").half().view(64, 64)
    out = ops.linear_gelu(x, weight, x.new_zeros(64), kernel="epilogue").double()
    tanh, erf = (F.gelu(x.double(), approximate=form) for form in ("tanh", "none"))
    assert (out - tanh).abs().max() < 0.3 * (erf - tanh).abs().max()
