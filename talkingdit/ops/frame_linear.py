# SPDX-License-Identifier: Apache-2.0
"""Every token times the matrix of its latent frame, gated and masked into the residual stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from talkingdit._native_loader import native
from talkingdit.ops import _matrix_kernels as matrix_kernels
from talkingdit.ops._checks import check_dims, check_float, check_out, check_same, check_shape, check_tensor, rows
from talkingdit.ops._frames import even_frames
from talkingdit.ops._library import register
from talkingdit.ops._memory import empty

__all__ = ["frame_linear", "frame_linear_reference"]

_ARGS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor? mask, Tensor? residual, SymInt tokens_per_frame, "
    "SymInt token_offset"
)

# Elements of a frame's result from which on the CPU takes frames one by one; for smaller ones, calls would cost more.
_LARGE_FRAME = 1 << 16
_ROOM = 32  # elements of bfloat16 that a CPU's matrix unit multiplies at once


def used_for(x: Tensor) -> bool:
    """True where the native kernel does the work; on the CPU products of torch do."""
    return x.is_cuda


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    tokens_per_frame: int,
    token_offset: int,
    add: bool,
    out: Tensor,
    kernel: str,
) -> None:
    """``add``: out is the residual as well."""
    residual = out if add else residual
    if not used_for(x):
        if tokens_per_frame * weight.shape[3] < _LARGE_FRAME:
            out.copy_(_per_frame(x, weight, bias, gate, mask, residual, tokens_per_frame, token_offset))
            return
        if (
            gate is None
            and mask is None
            and _add_products(x, weight, bias, residual, tokens_per_frame, token_offset, out)
        ):
            return
        # A frame at a time: nothing of the size of the result is made besides it, and where all have one dtype nothing
        # of the size of a frame either.
        same = all(t is None or t.dtype == out.dtype for t in (x, bias, gate, mask, residual))
        same = same and (residual is None or not _overlap(residual, out))
        for begin, end, frame in _frames(x.shape[1], tokens_per_frame, token_offset):
            before = None if residual is None else residual[:, begin:end]
            share = None if mask is None else mask[:, begin:end]
            if same:
                for sample, matrix, place in zip(x[:, begin:end], weight[:, frame], out[:, begin:end], strict=True):
                    torch.mm(sample, matrix, out=place)
                _epilogue(out[:, begin:end], bias, gate, share, before, out=out[:, begin:end])
            else:
                value = x[:, begin:end] @ weight[:, frame]
                out[:, begin:end] = _epilogue(value, bias, gate, share, before)
        return
    wide = torch.promote_types(x.dtype, torch.float32)
    bias, gate, mask = (None if t is None else rows(t.to(wide)) for t in (bias, gate, mask))
    residual = None if residual is None else rows(residual)
    if _request(x, weight, residual, out, kernel).cutlass():
        _run_cutlass(x, weight, bias, gate, mask, residual, tokens_per_frame, token_offset, out)
        return
    native.frame_linear(rows(x), rows(weight), bias, gate, mask, residual, out, tokens_per_frame, token_offset)


def _request(
    x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, kernel: str
) -> matrix_kernels.ProductRequest:
    in_place = [out] if residual is None else [out, residual]
    found = matrix_kernels.obstacle([x, weight], x.shape[2], in_place)
    columns, copies = weight.shape[3], not matrix_kernels.movable(weight)
    return matrix_kernels.ProductRequest("frame_linear", kernel, x.shape[2], columns, out.element_size(), found, copies)


def _run_cutlass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    tokens_per_frame: int,
    token_offset: int,
    out: Tensor,
) -> None:
    """A batched product for all whole frames, and one for each frame that the shard cuts."""
    if out.numel() == 0:
        return
    x, weight = matrix_kernels.moved(x), matrix_kernels.moved(weight)
    for tokens, frames in even_frames(x.shape[1], tokens_per_frame, token_offset):
        count = frames.stop - frames.start
        cut = [None if t is None else t[:, tokens].unflatten(1, (count, -1)) for t in (x, mask, residual, out)]
        for a, b, *others in _batches([cut[0], weight[:, frames], *cut[1:]]):
            share, before, result = others
            native.sm90_product(a, b, bias, gate, share, before, result, False)


def _batches(tensors: list[Tensor | None]) -> Iterator[list[Tensor | None]]:
    """Tensors [B, F, ...] as batches [B * F, ...] if strides allow that for all of them, else as B batches [F, ...]."""
    given = [t for t in tensors if t is not None]
    if all(1 in t.shape[:2] or t.stride(0) == t.shape[1] * t.stride(1) for t in given):
        yield [None if t is None else t.flatten(0, 1) for t in tensors]
    else:
        for sample in range(given[0].shape[0]):
            yield [None if t is None else t[sample] for t in tensors]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    tokens_per_frame: int,
    token_offset: int,
    kernel: str,
) -> Tensor:
    like = x if residual is None else residual
    out = empty((*x.shape[:2], weight.shape[3]), like)
    _run(x, weight, bias, gate, mask, residual, tokens_per_frame, token_offset, False, out, kernel)
    return out


def _fake(  # type: ignore[no-untyped-def]
    x, weight, bias, gate, mask, residual, tokens_per_frame, token_offset, kernel
):
    return (x if residual is None else residual).new_empty((*x.shape[:2], weight.shape[3]))


_op = register(f"frame_linear({_ARGS}, str kernel) -> Tensor", _forward, _fake)
_op_out = register(f"frame_linear_out({_ARGS}, bool add, Tensor(a!) out, str kernel) -> ()", _run, lambda *_: None)


def _add_products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tokens_per_frame: int,
    token_offset: int,
    out: Tensor,
) -> bool:
    """Whole frames of bfloat16 in one batched product that adds to the residual; False where that does not fit.

    The bias is one more row of the weight, and one more element of x that is 1. Wider types gain nothing by it.
    """
    given = [t for t in (x, weight, bias, residual, out) if t is not None]
    if residual is None or any(t.dtype != torch.bfloat16 for t in given):
        return False
    if x.shape[1] % tokens_per_frame or token_offset % tokens_per_frame:
        return False
    if residual is not out and _overlap(residual, out):
        return False
    batch, inner, count = x.shape[0], x.shape[2], x.shape[1] // tokens_per_frame
    first = token_offset // tokens_per_frame
    rows, matrices = x.unflatten(1, (count, tokens_per_frame)), weight[:, first : first + count]
    if bias is not None:
        room = -(-(inner + 1) // _ROOM) * _ROOM
        rows, matrices = x.new_zeros(*rows.shape[:3], room), x.new_zeros(batch, count, room, weight.shape[3])
        rows[..., :inner], rows[..., inner] = x.unflatten(1, (count, tokens_per_frame)), 1
        matrices[:, :, :inner], matrices[:, :, inner] = weight[:, first : first + count], bias
    for sample in range(batch):
        place = out[sample].unflatten(0, (count, tokens_per_frame))
        if residual is out:
            place.baddbmm_(rows[sample], matrices[sample])
        else:
            before = residual[sample].unflatten(0, (count, tokens_per_frame))
            torch.baddbmm(before, rows[sample], matrices[sample], out=place)
    return True


def _overlap(a: Tensor, b: Tensor) -> bool:
    """May they share memory, as the residual and the result of an in-place call do?"""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _frames(tokens: int, tokens_per_frame: int, token_offset: int) -> Iterator[tuple[int, int, int]]:
    """First token, end and number of every frame that a shard has tokens of."""
    begin = 0
    while begin < tokens:
        frame = (token_offset + begin) // tokens_per_frame
        end = min((frame + 1) * tokens_per_frame - token_offset, tokens)
        yield begin, end, frame
        begin = end


def _epilogue(
    value: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """``residual + mask * gate * (value + bias)``; ``out`` may be ``value``, of the dtype of all."""
    dtype = value.dtype if residual is None else residual.dtype
    if bias is not None:
        value = torch.add(value, bias, out=out)
    if gate is not None:
        value = torch.mul(value, gate, out=out)
    if mask is not None:
        value = torch.mul(value, mask[..., None], out=out)
    if residual is not None:
        value = torch.add(residual, value, out=out)
    return value.to(dtype)


def _per_frame(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    tokens_per_frame: int,
    token_offset: int,
) -> Tensor:
    tokens, first = x.shape[1], token_offset // tokens_per_frame
    if tokens % tokens_per_frame == 0 and token_offset % tokens_per_frame == 0:
        count = tokens // tokens_per_frame
        value = (x.unflatten(1, (count, tokens_per_frame)) @ weight[:, first : first + count]).flatten(1, 2)
    elif tokens == 0:  # of a frame that a shard cuts
        value = x @ weight[:, 0]
    else:
        frames = _frames(tokens, tokens_per_frame, token_offset)
        value = torch.cat([x[:, begin:end] @ weight[:, frame] for begin, end, frame in frames], dim=1)
    return _epilogue(value, bias, gate, mask, residual)


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    tokens_per_frame: int,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    token_offset: int,
) -> None:
    check_dims(op, "x", x, "B, N, K")
    check_float(op, "x", x)
    check_dims(op, "weight", weight, "B, F, K, dim")
    check_same(op, "weight", weight, "x", x)
    batch, tokens, inner = x.shape
    frames, dim = weight.shape[1], weight.shape[3]
    check_shape(op, "weight", weight, (batch, frames, inner, dim), "B, F, K, dim")
    for name, value, shape, axes in (
        ("bias", bias, (dim,), "dim"),
        ("gate", gate, (dim,), "dim"),
        ("mask", mask, (batch, tokens), "B, N"),
        ("residual", residual, (batch, tokens, dim), "B, N, dim"),
    ):
        if value is not None:
            check_tensor(op, name, value)
            check_shape(op, name, value, shape, axes)
            check_same(op, name, value, "x", x, dtype=False)
            check_float(op, name, value)
    if residual is not None and residual.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        raise TypeError(f"{op}: residual must have the dtype of x ({x.dtype}) or float32, got {residual.dtype}")
    if tokens_per_frame < 1 or token_offset < 0 or token_offset + tokens > frames * tokens_per_frame:
        raise ValueError(
            f"{op}: tokens must lie in the {frames} frames of weight, got tokens {token_offset} to "
            f"{token_offset + tokens} with tokens_per_frame {tokens_per_frame}"
        )


def frame_linear(
    x: Tensor,
    weight: Tensor,
    tokens_per_frame: int,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    token_offset: int = 0,
    out: Tensor | None = None,
    *,
    kernel: str = "auto",
) -> Tensor:
    """``residual + mask * gate * (x @ weight[frame] + bias)``, for inference.

    The output side of an audio cross-attention whose output projection was folded into the values, as in
    ``talkingdit.nn.audio_cross_attention``: x are the attention weights of all heads, K = H * A, and ``weight`` is
    [B, F, H * A, dim]. On a GPU everything is one kernel with float32 sums, which reads and writes the residual stream
    once.

    Args:
        x: [B, N, K]; token n belongs to frame ``(token_offset + n) // tokens_per_frame``.
        weight: [B, F, K, dim], dtype of x.
        tokens_per_frame: S.
        bias: [dim], added to the product.
        gate: [dim], multiplied with it.
        mask: [B, N], multiplied with it; the share of a token that the audio drives.
        residual: [B, N, dim], in the dtype of x or float32.
        token_offset: place of ``x[:, 0]`` in the whole sequence, for a contiguous shard.
        out: preallocated result, may be ``residual``.
        kernel: which one computes it on a GPU, "auto", "general" or "cutlass". The last one needs bfloat16 x and
            weight, a GPU of compute capability 9.0, and a result and residual whose rows are aligned to 16 bytes.

    Returns:
        [B, N, dim] in the dtype of the residual, or of x where there is none.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or the range of tokens do not fit.
        RuntimeError: a gradient is needed; write the products out (``frame_linear_reference``) to train.
    """
    _check("frame_linear", x, weight, tokens_per_frame, bias, gate, mask, residual, token_offset)
    matrix_kernels.check_kernel("frame_linear", kernel, x.device)
    given = [t for t in (x, weight, bias, gate, mask, residual) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise RuntimeError(
            "frame_linear: it has no gradient; call it under torch.no_grad(), or frame_linear_reference to train"
        )
    if out is None:
        return _op(x, weight, bias, gate, mask, residual, tokens_per_frame, token_offset, kernel)
    dtype = x.dtype if residual is None else residual.dtype
    check_out("frame_linear", out, (*x.shape[:2], weight.shape[3]), dtype, given)
    add = residual is out
    before = None if add else residual
    _op_out(x, weight, bias, gate, mask, before, tokens_per_frame, token_offset, add, out, kernel)
    return out


def frame_linear_reference(
    x: Tensor,
    weight: Tensor,
    tokens_per_frame: int,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    token_offset: int = 0,
) -> Tensor:
    """:func:`frame_linear` in plain PyTorch, with gradients: a batched product, or one per frame if frames are cut."""
    _check("frame_linear_reference", x, weight, tokens_per_frame, bias, gate, mask, residual, token_offset)
    return _per_frame(x, weight, bias, gate, mask, residual, tokens_per_frame, token_offset)
