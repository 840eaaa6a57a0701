# SPDX-License-Identifier: Apache-2.0
"""Attention in one process: packed samples, joint tokens, and the pieces that ring attention is made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from talkingdit.nn import attention, attention_pieces


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """[B, N, H, D], allowed [B or 1, 1, N or 1, M] -> [B, N, H, D], written out."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def assert_same_with_gradients(got: Tensor, want: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    weight = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_packed_samples_attend_to_themselves_only(masked: bool) -> None:
    q, k, v = (normal(2, 20, 3, 8) for _ in range(3))
    sample = torch.tensor([0] * 7 + [1] * 1 + [2] * 12)
    mask = torch.ones(2, 20, dtype=torch.bool)
    if masked:
        mask[0, :3] = mask[1, 12:] = False
    allowed = (sample[:, None] == sample) & mask[:, None, None]
    got = attention(q, k, v, mask=mask if masked else None, segments=[7, 8, 20])
    assert_same_with_gradients(got, softmax_attention(q, k, v, allowed), q, k, v)


@pytest.mark.parametrize("masked", [False, True])
def test_joint_tokens_attend_and_are_attended(masked: bool) -> None:
    tensors = [normal(2, length, 3, 8) for length in (9, 4) for _ in range(3)]
    mask = torch.ones(2, 13, dtype=torch.bool)
    if masked:
        mask[0, 11:] = False  # padding of a text
    got = attention(*tensors[:3], joint=tuple(tensors[3:]), mask=mask if masked else None)
    q, k, v = (torch.cat(pair, 1) for pair in zip(tensors[:3], tensors[3:], strict=True))
    assert [x.shape[1] for x in got] == [9, 4]
    assert_same_with_gradients(torch.cat(got, 1), softmax_attention(q, k, v, mask[:, None, None]), *tensors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "best"}, "backend must be auto or one of flash, efficient, cudnn, math, .*, got 'best'"),
        ({"mask": torch.ones(2, 5)}, r"mask must have the shape of the keys \(2, 6\), got \(2, 5\)"),
        ({"segments": []}, r"segments must be rising ends .* length 6, and q as long, got \[\] and 6 queries"),
        ({"segments": [3, 3, 6]}, r"segments must be rising ends .* got \[3, 3, 6\]"),
        ({"segments": [3, 5]}, r"segments must be rising ends .* length 6, .* got \[3, 5\]"),
        ({"segments": [6], "joint": (torch.ones(2, 1, 2, 4),) * 3}, "segments cannot be combined with joint"),
        ({"joint": (torch.ones(2, 1, 2, 4),) * 2 + (torch.ones(2, 3, 2, 4),)}, r"joint v must be \[2, L, 2, 4\]"),
        ({"joint": (torch.ones(2, 1, 2, 4),) * 3, "mask": torch.ones(2, 6)}, r"the keys \(2, 7\), got \(2, 6\)"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    x = torch.zeros(2, 6, 2, 4)
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        attention(x, x, x, **arguments)


KERNELS = [("cpu", backend, dtype) for backend in ("auto", "math") for dtype in (torch.float64, torch.bfloat16)] + [
    pytest.param("cuda", backend, dtype, marks=pytest.mark.cuda)
    for backend, dtypes in {
        "flash": [torch.bfloat16, torch.float16],
        "efficient": [torch.bfloat16, torch.float32],
        "cudnn": [torch.bfloat16],
        "math": [torch.float32],
        "auto": [torch.bfloat16, torch.float32],
    }.items()
    for dtype in dtypes
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("device", "backend", "dtype"), KERNELS)
def test_attention_in_pieces_is_attention(device: str, backend: str, dtype: torch.dtype, masked: bool) -> None:
    """Every kernel's softmax denominator and its backward with that of the whole, as ring attention uses them."""
    if masked and device == "cuda" and backend in ("flash", "cudnn"):
        pytest.skip("has no mask")
    q, k, v = (normal(2, length, 3, 64, dtype=dtype, device=device) for length in (37, 50, 50))
    mask = torch.ones(2, 50, dtype=torch.bool, device=device)
    if masked:
        mask[0, :30] = mask[1, 45:] = False  # the first sample has no key in the first piece
    pieces = [slice(0, 13), slice(13, 14), slice(14, 50)]
    cuts = [
        (*(x.detach()[:, piece].transpose(1, 2) for x in (k, v)), mask[:, piece] if masked else None)
        for piece in pieces
    ]
    queries = q.detach().transpose(1, 2)
    results = [attention_pieces.forward(queries, *cut, backend) for cut in cuts]
    lse = torch.stack([result[1] for result in results]).logsumexp(0)
    out = sum(part * (part_lse - lse).exp()[..., None] for part, part_lse, _ in results)

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = softmax_attention(*wide, mask[:, None, None])
    weight = torch.randn_like(want).to(dtype)
    want_grads = torch.autograd.grad(want, wide, weight.double())
    whole = attention_pieces.AttentionPiece(out.to(dtype), lse, results[0].extra)
    grads = [attention_pieces.backward(weight.transpose(1, 2), queries, *cut, whole, backend) for cut in cuts]
    got_grads = [sum(g[0] for g in grads), *(torch.cat([g[i] for g in grads], 2) for i in (1, 2))]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    for got, expected in zip([out, *got_grads], [want, *want_grads], strict=True):
        error = (got.transpose(1, 2) - expected).norm() / expected.norm()
        assert error < tolerance


def test_pieces_name_the_backends_of_the_device() -> None:
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match="in ring mode backend must be one of flash, math, auto on cpu, got 'cudnn'"):
        attention_pieces.forward(x, x, x, None, "cudnn")
