# SPDX-License-Identifier: Apache-2.0
"""frame_linear against the product of every single token with the matrix of its frame."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from talkingdit import ops
from talkingdit.ops import _matrix_kernels

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


@pytest.mark.parametrize("where", ["fresh", "out", "in place"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("frames", "offset"), [(3, 0), (2, 300)])
def test_large_frames_of_bfloat16_are_added_to_the_residual(where: str, bias: bool, frames: int, offset: int) -> None:
    """In one product on the CPU, rounded once: nearer to float64 than a product and a sum that are each rounded."""
    given = sized(torch.bfloat16, B, 300 * frames, 3, 60, 256)
    arguments = [given["x"], given["weight"], 300]
    options = {"bias": given["bias"] if bias else None, "token_offset": offset}
    wide = [t.double() for t in arguments[:2]]
    exact = ops.frame_linear_reference(
        *wide, 300, bias=given["bias"].double() if bias else None, residual=given["residual"].double(),
        token_offset=offset,
    )  # fmt: skip
    residual = given["residual"].clone()
    out = {"fresh": None, "out": torch.empty_like(residual), "in place": residual}[where]
    got = ops.frame_linear(*arguments, residual=residual, out=out, **options)
    assert relative(got, exact) < 2e-3
    assert where == "in place" or torch.equal(residual, given["residual"])


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


def test_which_kernel_is_checked() -> None:
    given = draw(torch.float32)
    with pytest.raises(ValueError, match=r"frame_linear: kernel must be one of auto, general, cutlass, got 'fast'"):
        ops.frame_linear(**given, tokens_per_frame=S, kernel="fast")
    with pytest.raises(ValueError, match=r"frame_linear: kernel must be 'auto' for tensors on the CPU, got 'cutlass'"):
        ops.frame_linear(**given, tokens_per_frame=S, kernel="cutlass")


def needs(kernel: str) -> None:
    if kernel == "cutlass" and not _matrix_kernels.ready(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("needs a GPU of compute capability 9.0 and a build for it")


def sized(dtype: torch.dtype, batch: int, tokens: int, frames: int, inner: int, dim: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {"x": (batch, tokens, inner), "weight": (batch, frames, inner, dim), "bias": (dim,), "gate": (dim,)}
    shapes |= {"mask": (batch, tokens), "residual": (batch, tokens, dim)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.cpu().double() - b).norm() / b.norm())


BOUND = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cuda_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    given = sized(dtype, 2, 700, 5, 200, 333)
    truth = ops.frame_linear_reference(
        tokens_per_frame=160, token_offset=70, **{name: value.double() for name, value in given.items()}
    )
    moved = {name: value.cuda() for name, value in given.items()}
    out = ops.frame_linear(tokens_per_frame=160, token_offset=70, **moved)
    stream = moved["residual"]
    ops.frame_linear(tokens_per_frame=160, token_offset=70, **moved, out=stream)
    assert torch.equal(out, stream)
    assert relative(out, truth) < BOUND[dtype]


# Batch, tokens, frames, tokens per frame, offset, K and channels.
SIZES = {
    "whole tiles": (1, 512, 2, 256, 0, 128, 256),
    "rest of every size": (2, 700, 5, 160, 70, 200, 336),
    "short sums": (2, 300, 3, 100, 0, 60, 136),
    "odd sums": (1, 130, 2, 65, 0, 15, 72),
    "many tiles": (1, 2912, 2, 1456, 0, 1600, 1024),  # more than multiprocessors: blocks go on to a second one
    "frames of one token": (1, 9, 9, 1, 0, 8, 40),
}


@pytest.mark.cuda
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["general", "cutlass"])
def test_cuda_kernels_agree_with_float64(kernel: str, stream: torch.dtype, size: str) -> None:
    """Every part of the epilogue and none of them, in place and not, the same bits every time."""
    needs(kernel)
    batch, tokens, frames, per_frame, offset, inner, dim = SIZES[size]
    given = sized(torch.bfloat16, batch, tokens, frames, inner, dim)
    given["residual"] = given["residual"].to(stream) / 3
    place = {"tokens_per_frame": per_frame, "token_offset": offset}
    moved = {name: value.cuda() for name, value in given.items()}
    for names in (tuple(given), ("x", "weight"), ("x", "weight", "gate", "residual"), ("x", "weight", "bias", "mask")):
        truth = ops.frame_linear_reference(**{name: given[name].double() for name in names}, **place)
        chosen = {name: moved[name] for name in names}
        out = ops.frame_linear(**chosen, **place, kernel=kernel)
        assert out.dtype == (stream if "residual" in names else torch.bfloat16)
        assert relative(out, truth) < (5e-3 if out.dtype == torch.bfloat16 else 1e-5), names
        again = torch.full_like(out, 7)
        ops.frame_linear(**chosen, **place, out=again, kernel=kernel)
        assert torch.equal(again, out)
    expected = ops.frame_linear(**moved, **place, kernel=kernel)
    ops.frame_linear(**moved, **place, out=moved["residual"], kernel=kernel)
    assert torch.equal(moved["residual"], expected)


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", ["general", "cutlass"])
def test_cuda_kernels_take_parts_of_larger_tensors_and_graphs_capture_them(kernel: str) -> None:
    """Columns of wider operands and part of a longer stream, whose rest stays as it is; replayed on new input."""
    needs(kernel)
    given = sized(torch.bfloat16, 2, 384, 3, 72, 200)
    place = {"tokens_per_frame": 128}
    wide = {name: torch.full((*given[name].shape[:-1], 240), 3.0).bfloat16().cuda() for name in ("x", "weight")}
    x, weight = (wide[name][..., 8 : 8 + given[name].shape[-1]] for name in ("x", "weight"))
    stream = torch.full((2, 400, 216), 7.0, device="cuda")
    noisy = stream[:, 5:389, 8:208]
    rest = {name: given[name].cuda() for name in ("bias", "gate", "mask")}

    def fill(generator: torch.Generator) -> Tensor:
        for target, name in ((x, "x"), (weight, "weight"), (noisy, "residual")):
            given[name] = torch.randn(given[name].shape, generator=generator).bfloat16()
            target.copy_(given[name])
        return ops.frame_linear_reference(**{name: value.double() for name, value in given.items()}, **place)

    def run() -> None:
        ops.frame_linear(x, weight, **rest, **place, residual=noisy, out=noisy, kernel=kernel)

    generator = torch.Generator().manual_seed(1)
    truth = fill(generator)
    run()
    assert relative(noisy, truth) < 1e-5
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    truth = fill(generator)
    graph.replay()
    assert relative(noisy, truth) < 1e-5
    noisy.fill_(7)
    assert bool((stream == 7).all())
