# SPDX-License-Identifier: Apache-2.0
"""Attention in bfloat16 with gradients, on processors that multiply it: as near to the truth as PyTorch's kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.nn import attention, bfloat16_attention

SHAPE = {"q": (2, 150, 3, 32), "k": (2, 201, 3, 32), "v": (2, 201, 3, 32)}


def tensors(scale: float) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape).bfloat16() for shape in SHAPE.values())
    return q * scale, k, v


def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None]).transpose(1, 2)


def with_gradients(function: Callable[..., Tensor], given: tuple[Tensor, ...], mask: Tensor | None) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    out = function(*leaves, mask)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_results_and_gradients_are_as_near_to_float64_as_those_of_the_kernel(masked: bool, scale: float) -> None:
    given = tensors(scale)
    mask = torch.ones(2, 201, dtype=torch.bool)
    mask[0, 20:] = mask[1, :7] = False
    chosen = mask if masked else None
    want = with_gradients(kernel, tuple(x.double() for x in given), chosen)
    theirs = with_gradients(kernel, given, chosen)
    got = with_gradients(bfloat16_attention.attend, given, chosen)
    for a, b, truth in zip(got, theirs, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - truth).norm() < 2 * (b.double() - truth).norm()
    if masked:
        assert not got[2][0, 20:].any()
        assert not got[3][1, :7].any()


@pytest.mark.parametrize(
    ("tokens", "keys", "expected"),
    [
        (150, 201, "products"),
        (2000, 36, "products"),
        (150, 36, "float32"),  # no work
        (6000, 6000, "kernel"),  # weights of 200 MB
        (60_000, 36, "kernel"),
    ],
)
def test_the_way_goes_by_the_number_of_weights(
    tokens: int, keys: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = (torch.empty(2, length, 3, 8, dtype=torch.bfloat16) for length in (tokens, keys))
    monkeypatch.setattr(bfloat16_attention, "multiplies_bfloat16", lambda device: True)
    assert bfloat16_attention.way(q, k) == expected
    assert bfloat16_attention.way(q.half(), k.half()) == "float32"
    monkeypatch.setattr(bfloat16_attention, "multiplies_bfloat16", lambda device: False)
    assert bfloat16_attention.way(q, k) == "float32"


def test_attention_goes_through_it_for_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16_attention, "multiplies_bfloat16", lambda device: True)
    q, k, v = tensors(1.0)
    ours = bfloat16_attention.attend(q, k, v, None)
    assert not torch.equal(ours, kernel(q, k, v, None))
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v), kernel(q, k, v, None), rtol=0, atol=0)
    torch.testing.assert_close(attention(q, k, v.requires_grad_()), ours, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):  # does not reach into the scores
        torch.testing.assert_close(attention(q, k, v), ours, rtol=0, atol=0)


def test_compiled_attention_stays_one_graph() -> None:
    given = [x.requires_grad_() for x in tensors(1.0)]
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    got, want = compiled(*given), kernel(*(x.double() for x in given), None)
    assert (got.double() - want).norm() < 0.01 * want.norm()
