# SPDX-License-Identifier: Apache-2.0
"""frame_linear against the product of every single token with the matrix of its frame."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from talkingdit import ops

B, F, S, K, DIM = 2, 3, 5, 6, 8


def draw(dtype: torch.dtype = torch.float64, tokens: int = F * S) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (B, tokens, K), "weight": (B, F, K, DIM), "bias": (DIM,), "gate": (DIM,), "mask": (B, tokens)}
    return {
        k: torch.randn(v, generator=generator).to(dtype) for k, v in {**shapes, "residual": (B, tokens, DIM)}.items()
    }


@pytest.mark.parametrize("function", [ops.frame_linear, ops.frame_linear_reference])
@pytest.mark.parametrize(("offset", "tokens"), [(0, 9), (3, 9), (5, 10)])
@pytest.mark.parametrize("large", [1, 1 << 16])
def test_every_token_uses_the_matrix_of_its_frame(
    function, offset: int, tokens: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards that cut frames and one that does not, frames one by one (as large ones on the CPU) and all at once."""
    monkeypatch.setattr(sys.modules["talkingdit.ops.frame_linear"], "_LARGE_FRAME", large)
    given = draw(tokens=tokens)
    out = function(tokens_per_frame=S, token_offset=offset, **given)
    for b in range(B):
        for n in range(tokens):
            value = given["x"][b, n] @ given["weight"][b, (offset + n) // S] + given["bias"]
            expected = given["residual"][b, n] + given["mask"][b, n] * given["gate"] * value
            torch.testing.assert_close(out[b, n], expected)
    plain = function(given["x"], given["weight"], S, token_offset=offset)
    torch.testing.assert_close(plain[0, 0], given["x"][0, 0] @ given["weight"][0, offset // S])


def test_in_place_and_residual_of_float32() -> None:
    given = draw(torch.bfloat16)
    given["residual"] = given["residual"].float()
    expected = ops.frame_linear(tokens_per_frame=S, **given)
    assert expected.dtype == torch.float32
    out = given["residual"].clone()
    assert ops.frame_linear(tokens_per_frame=S, **{**given, "residual": out}, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("large", [1, 1 << 16])
def test_residual_and_out_may_be_two_views_of_one_memory(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["talkingdit.ops.frame_linear"], "_LARGE_FRAME", large)
    given = draw()
    expected = ops.frame_linear_reference(tokens_per_frame=S, **given)
    memory = given["residual"].clone()
    ops.frame_linear(tokens_per_frame=S, **{**given, "residual": memory.view(memory.shape)}, out=memory)
    torch.testing.assert_close(memory, expected)


@pytest.mark.parametrize("offset", [0, 3])
def test_no_tokens_are_no_problem(offset: int) -> None:
    given = draw(torch.float32)
    empty, weight = given["x"][:, :0], given["weight"]
    assert ops.frame_linear(empty, weight, S, token_offset=offset).shape == (B, 0, weight.shape[3])
    ops.frame_linear_reference(empty, weight.requires_grad_(), S, token_offset=offset).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_opcheck_and_compile() -> None:
    given = draw(torch.float32)
    arguments = [given[name] for name in ("x", "weight", "bias", "gate", "mask", "residual")]
    torch.library.opcheck(torch.ops.talkingdit.frame_linear, (*arguments, S, 0, "auto"))
    compiled = torch.compile(ops.frame_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens_per_frame=S, **given), ops.frame_linear(tokens_per_frame=S, **given))


def test_errors_say_what_is_wrong() -> None:
    given = draw(torch.float32)
    with pytest.raises(ValueError, match=r"frame_linear: weight must have shape \[B, F, K, dim\] = \(2, 3, 6, 8\)"):
        ops.frame_linear(given["x"], given["weight"][:, :, 1:], S)
    with pytest.raises(ValueError, match=r"tokens must lie in the 3 frames of weight, got tokens 1 to 16"):
        ops.frame_linear(given["x"], given["weight"], S, token_offset=1)
    with pytest.raises(TypeError, match=r"residual must have the dtype of x \(torch.float32\) or float32"):
        ops.frame_linear(given["x"], given["weight"], S, residual=given["residual"].double())
    with pytest.raises(RuntimeError, match=r"frame_linear: it has no gradient"):
        ops.frame_linear(given["x"].requires_grad_(), given["weight"], S)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cuda_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = {"x": (2, 700, 200), "weight": (2, 5, 200, 333), "bias": (333,), "gate": (333,), "mask": (2, 700)}
    shapes["residual"] = (2, 700, 333)
    given = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    truth = ops.frame_linear_reference(
        tokens_per_frame=160, token_offset=70, **{name: value.double() for name, value in given.items()}
    )
    moved = {name: value.cuda() for name, value in given.items()}
    out = ops.frame_linear(tokens_per_frame=160, token_offset=70, **moved)
    stream = moved["residual"]
    ops.frame_linear(tokens_per_frame=160, token_offset=70, **moved, out=stream)
    assert torch.equal(out, stream)
    bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]
    assert float((out.cpu().double() - truth).norm() / truth.norm()) < bound
