# SPDX-License-Identifier: Apache-2.0
"""bfloat16 is computed in where that is faster: not on processors without instructions for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit import build_info
from talkingdit.nn import bfloat16


def test_a_processor_multiplies_bfloat16_where_its_instructions_do() -> None:
    expected = build_info()["cpu_isa"] == "avx512_bf16"
    assert bfloat16.multiplies_bfloat16(torch.device("cpu")) is expected
    assert bfloat16.multiplies_bfloat16(torch.device("cuda"))


@pytest.mark.parametrize(("instructions", "dtype"), [("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_products_are_in_bfloat16_where_that_is_faster(
    instructions: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "_instructions", lambda: instructions)
    layer = torch.nn.Linear(4, 3)
    with bfloat16.bfloat16_products():
        assert layer(torch.ones(2, 4)).dtype == dtype
    assert layer(torch.ones(2, 4)).dtype == torch.float32


@pytest.mark.parametrize("name", ["linear", "matmul", "bmm", "conv2d", "attention"])
def test_products_that_are_widened_are_rounded_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64: no further from it than the rounding of the result; other dtypes are left alone."""
    monkeypatch.setattr(bfloat16, "_instructions", lambda: "avx2")
    functions: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
        "linear": (F.linear, [(9, 300), (40, 300), (40,)]),
        "matmul": (lambda a, b: a @ b, [(2, 9, 300), (300, 40)]),
        "bmm": (torch.bmm, [(2, 9, 300), (2, 300, 40)]),
        "conv2d": (F.conv2d, [(2, 16, 9, 9), (8, 16, 3, 3), (8,)]),
        "attention": (F.scaled_dot_product_attention, [(2, 3, 20, 32)] * 3),
    }
    function, shapes = functions[name]
    torch.manual_seed(0)
    given = [torch.randn(shape).bfloat16() for shape in shapes]
    with bfloat16.fast_products(torch.device("cpu")):
        found = function(*given)
        assert function(*(x.float() for x in given)).dtype == torch.float32
    truth = function(*(x.double() for x in given))
    assert found.dtype == torch.bfloat16
    error = (found.double() - truth).abs() - 1e-5 * truth.abs().max()
    assert (error <= truth.abs() * torch.finfo(torch.bfloat16).eps / 2).all()


def test_results_that_are_given_and_weights_of_other_kinds_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(Tensor):
        """Of a library, with products of its own."""

        products = 0

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.products += func is F.linear
            return super().__torch_function__(func, types, args, kwargs or {})

    monkeypatch.setattr(bfloat16, "_instructions", lambda: "avx2")
    x, weight = torch.randn(4, 6).bfloat16(), torch.randn(5, 6).bfloat16()
    out = torch.zeros(4, 5, dtype=torch.bfloat16)
    with bfloat16.fast_products(torch.device("cpu")):
        torch.mm(x, weight.T, out=out)
        assert F.linear(x, weight.as_subclass(Counted)).dtype == torch.bfloat16
        torch.testing.assert_close(F.linear(input=x, weight=weight), out)
    assert out.abs().sum() > 0
    assert Counted.products == 1


def test_processors_that_multiply_bfloat16_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "_instructions", lambda: "avx512_bf16")
    assert isinstance(bfloat16.fast_products(torch.device("cpu")), nullcontext)
    monkeypatch.setattr(bfloat16, "_instructions", lambda: "avx2")
    assert isinstance(bfloat16.fast_products(torch.device("cuda")), nullcontext)
