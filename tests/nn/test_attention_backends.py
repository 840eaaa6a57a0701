# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes attention, and kernels of libraries behind the one function, with stand-ins for them."""

from __future__ import annotations

import subprocess
import sys

import attention_libraries
import pytest
import torch
from torch import Tensor

from talkingdit.cli.main import main
from talkingdit.nn import attention, attention_backends, attention_pieces
from talkingdit.nn.attention_backends import choose

HALF = torch.bfloat16


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Tensors of the host count as a Hopper's, and no library is installed; what was found is forgotten."""
    monkeypatch.setattr(attention_backends, "_capability_of", lambda q: (9, 0))
    monkeypatch.setattr(attention_backends, "_FOUND", {})
    return monkeypatch


@pytest.fixture
def with_libraries(on_gpu: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, module in attention_libraries.modules().items():
        on_gpu.setitem(sys.modules, name, module)
    return on_gpu


def tensors(dtype: torch.dtype = HALF, queries: int = 37, keys: int = 50, dim: int = 64) -> list[Tensor]:
    return [torch.randn(2, length, 3, dim).to(dtype) for length in (queries, keys, keys)]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def test_cudnn_comes_first_on_hopper_and_torch_decides_elsewhere(on_gpu: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 3, 64, dtype=HALF)
    assert choose("auto", q, False, True) == "cudnn_first"
    assert choose("auto", q.float(), True, True) == "cudnn_first"
    for capability in ((8, 0), (8, 9), (12, 0)):
        on_gpu.setattr(attention_backends, "_capability_of", lambda q, found=capability: found)
        assert choose("auto", q, False, True) == "torch"
    on_gpu.setattr(attention_backends, "_capability_of", lambda q: None)
    assert choose("auto", q, False, True) == "torch"


def test_exact_libraries_are_taken_where_they_fit(with_libraries: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 3, 64, dtype=HALF)
    assert choose("auto", q, False, True) == "flash3"
    assert choose("auto", q, True, True) == "cudnn_first"
    assert choose("auto", q.float(), False, True) == "cudnn_first"
    assert choose("auto", torch.zeros(1, 2, 3, 60, dtype=HALF), False, False) == "cudnn_first"
    assert choose("auto", q, False, True, ring=True) == "cudnn_first", "its backward starts from its own forward"
    assert choose("auto", q, False, False, ring=True) == "flash3"
    assert choose("sage", q, False, False) == "sage"
    assert choose("sage", q, True, False) == "cudnn_first"
    assert choose("sage", torch.zeros(1, 2, 3, 256, dtype=HALF), False, False) == "flash3"


@pytest.mark.parametrize(("backend", "bound"), [("auto", 4e-3), ("flash3", 4e-3), ("flash3_fp8", 8e-2), ("sage", 2e-2)])
def test_libraries_compute_attention(with_libraries: pytest.MonkeyPatch, backend: str, bound: float) -> None:
    q, k, v = tensors()
    with torch.no_grad():
        got = attention(q, k, v, backend=backend)
        packed = attention(k, k, v, backend=backend, segments=[20, 50])
    assert got.dtype == HALF
    assert error(got, exact(q, k, v)) < bound
    parts = [exact(k[:, part], k[:, part], v[:, part]) for part in (slice(0, 20), slice(20, 50))]
    assert error(packed, torch.cat(parts, 1)) < bound


def test_float8_heads_have_scales_of_their_own(with_libraries: pytest.MonkeyPatch) -> None:
    """A loud head must not push a quiet one out of the range of float8."""
    q, k, v = tensors()
    v = v * torch.tensor([1e-4, 1.0, 1e4], dtype=HALF)[:, None]
    got, want = attention(q, k, v, backend="flash3_fp8"), exact(q, k, v)
    for head in range(3):
        assert error(got[:, :, head], want[:, :, head]) < 8e-2


def test_first_releases_of_flash_attention_3(with_libraries: pytest.MonkeyPatch) -> None:
    with_libraries.setattr(
        sys.modules["flash_attn_interface"], "flash_attn_func", attention_libraries.old_flash_attn_func
    )
    q, k, v = tensors()
    for lse in (False, True):
        out, denominator = attention_backends.attend("flash3", q, k, v, lse)
        assert error(out, exact(q, k, v)) < 4e-3
        assert (denominator is not None) == lse


def test_gradients_go_through_flash_attention_3(with_libraries: pytest.MonkeyPatch) -> None:
    leaves = [x.requires_grad_() for x in tensors()]
    weight = torch.randn(2, 37, 3, 64)
    got = torch.autograd.grad((attention(*leaves, backend="flash3") * weight).sum(), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = torch.autograd.grad((exact(*wide) * weight).sum(), wide)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-2


@pytest.mark.parametrize(("backend", "bound"), [("flash3", 6e-3), ("flash3_fp8", 8e-2), ("sage", 2e-2)])
def test_pieces_of_libraries_are_merged(with_libraries: pytest.MonkeyPatch, backend: str, bound: float) -> None:
    """Ring attention asks for the softmax denominator, a natural logarithm of scaled scores."""
    q, k, v = tensors()
    queries = q.transpose(1, 2)
    pieces = [
        attention_pieces.forward(queries, k[:, cut].transpose(1, 2), v[:, cut].transpose(1, 2), None, backend)
        for cut in (slice(0, 13), slice(13, 50))
    ]
    lse = torch.stack([piece.lse for piece in pieces]).logsumexp(0)
    out = sum(piece.out * (piece.lse - lse).exp()[..., None] for piece in pieces)
    assert error(out.transpose(1, 2), exact(q, k, v)) < bound


def test_what_cannot_be_is_refused(with_libraries: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match="attention: backend sage has no backward, got tensors that need a gradient"):
        attention(q.requires_grad_(), k, v, backend="sage")
    with_libraries.setattr(attention_backends, "_capability_of", lambda q: (8, 0))
    assert choose("sage", k, False, False) == "sage"
    with pytest.raises(ValueError, match=r"flash3 runs on GPUs of compute capability 9.0 \(Hopper\), got 8.0"):
        attention(q, k, v, backend="flash3")
    with_libraries.setattr(attention_backends, "_capability_of", lambda q: None)
    with pytest.raises(ValueError, match="backend flash3_fp8 runs on CUDA devices, got cpu"):
        attention(q.detach(), k, v, backend="flash3_fp8")
    for name in attention_libraries.modules():
        with_libraries.delitem(sys.modules, name)
    attention_backends._FOUND.clear()
    with pytest.raises(ValueError, match="backend sage needs the package sageattention, which is not installed"):
        attention(q.detach(), k, v, backend="sage")


def test_cudnn_first_leaves_the_others_as_a_way_out(on_gpu: pytest.MonkeyPatch) -> None:
    """PyTorch passes over kernels that cannot run, here cuDNN on the host."""
    q, k, v = tensors()
    assert error(attention(q, k, v), exact(q, k, v)) < 4e-3


def test_importing_the_choice_brings_no_compiler_in() -> None:
    """Which takes seconds."""
    code = "import sys, talkingdit.nn; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_info_tells_the_choice_and_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert "no GPU" in lines["attention"] or torch.cuda.is_available()
    for name in attention_backends.LIBRARIES:
        assert f"{name} not installed" in lines["attention libraries"] or attention_backends.installed(name)
