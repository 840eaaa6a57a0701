# SPDX-License-Identifier: Apache-2.0
"""GELU with tanh on CPUs against float64, in place, over strided rows, and beside PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit import ops
from talkingdit.nn.layers import GeluTanh

NARROW = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*NARROW, torch.float64]
SHAPES = [(), (0,), (1,), (37,), (3, 0), (5, 2049), (2, 3, 4096), (70001,)]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 3) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def torch_gradient(x: Tensor, grad: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_close_to_the_truth_as_those_of_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, grad = draw(shape, dtype).requires_grad_(), draw(shape, dtype, 4)
    out = ops.gelu_tanh(x)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    out.backward(grad)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    wide, wide_grad = x.detach().double(), grad.double()
    for ours, theirs, truth in (
        (out, F.gelu(x, approximate="tanh"), F.gelu(wide, approximate="tanh")),
        (x.grad, torch_gradient(x.detach(), grad), torch_gradient(wide, wide_grad)),
    ):
        errors = [
            (got.detach().double() - truth).abs().max().item() if truth.numel() else 0.0 for got in (ours, theirs)
        ]
        assert errors[0] <= 1.25 * errors[1] + 1e-7 * max(1.0, truth.abs().max().item() if truth.numel() else 0.0)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_far_and_special_numbers(dtype: torch.dtype) -> None:
    """PyTorch's gradient is NaN where x^2 overflows; the right one is 0 or 1."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest, 90.0, -90.0, 20.0, -20.0, 0.0, -0.0, float("inf"), float("nan")], dtype=dtype)
    x.requires_grad_()
    out = ops.gelu_tanh(x)
    out.backward(torch.ones_like(out))
    want = torch.tensor([largest, 0, 90, 0, 20, 0, 0, 0, float("inf"), float("nan")], dtype=dtype)
    assert torch.equal(out.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
    slopes = torch.tensor([1, 0, 1, 0, 1, 0, 0.5, 0.5, 1, float("nan")], dtype=dtype)
    assert x.grad is not None
    assert torch.equal(x.grad.nan_to_num(nan=7.0), slopes.nan_to_num(nan=7.0))


def test_small_results_keep_their_digits() -> None:
    """1 + tanh loses them all for x below -5, where the value is not yet zero."""
    x = torch.linspace(-8, -3, 101)
    wide = x.double()
    truth = wide * torch.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide**3))
    torch.testing.assert_close(ops.gelu_tanh(x).double(), truth, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_has_the_same_bits_and_leaves_the_rest_of_wider_rows(dtype: torch.dtype) -> None:
    for wide in (draw((2, 5, 96), dtype), draw((4, 5, 3, 96), dtype)[:, ::2]):
        before, part = wide.clone(), wide[..., 32:]
        want = ops.gelu_tanh(part)
        assert ops.overwrite_with_gelu_tanh(part) is part
        assert torch.equal(part, want)
        assert torch.equal(wide[..., :32], before[..., :32])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_any_strides_have_the_bits_of_packed_rows(dtype: torch.dtype) -> None:
    x, grad = draw((6, 40, 50), dtype), draw((6, 40, 50), dtype, 4)
    want, slopes = ops.gelu_tanh(x), torch.ops.talkingdit.gelu_tanh_backward(grad, x)
    for view in (x.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([x, x], -1)[..., :50]):
        assert torch.equal(ops.gelu_tanh(view), want)
        assert torch.equal(torch.ops.talkingdit.gelu_tanh_backward(grad, view), slopes)
        assert torch.equal(torch.ops.talkingdit.gelu_tanh_backward(torch.cat([grad, grad], -1)[..., 50:], view), slopes)


def test_the_result_does_not_depend_on_threads() -> None:
    x, threads = draw((70001,), torch.bfloat16), torch.get_num_threads()
    want = ops.gelu_tanh(x)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(ops.gelu_tanh(x), want)
    finally:
        torch.set_num_threads(threads)


def test_registered_ops_have_the_shapes_they_say() -> None:
    x = draw((3, 50), torch.bfloat16)
    torch.library.opcheck(torch.ops.talkingdit.gelu_tanh.default, (x.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.talkingdit.gelu_tanh_backward.default, (x, x))
    torch.library.opcheck(torch.ops.talkingdit.gelu_tanh_.default, (x.clone(),))


def test_the_layer_is_one_of_pytorch_and_has_the_bits_of_the_op() -> None:
    x, layer = draw((3, 50), torch.bfloat16), GeluTanh()
    assert isinstance(layer, torch.nn.GELU)
    assert layer.approximate == "tanh"
    assert torch.equal(layer(x), ops.gelu_tanh(x))


def test_a_compiled_graph_takes_pytorchs_own() -> None:
    """Which it can fuse with what is around it."""
    x, seen = draw((3, 50), torch.float32), []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(GeluTanh(), backend=look, fullgraph=True)(x)
    assert len(seen) == 1
    assert "gelu" in seen[0]
    assert "talkingdit" not in seen[0]


def test_integers_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"gelu_tanh: x must be float32, float64, bfloat16 or float16, got torch\.int64"
    ):
        ops.gelu_tanh(torch.arange(3))
