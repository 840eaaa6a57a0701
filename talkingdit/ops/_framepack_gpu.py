# SPDX-License-Identifier: Apache-2.0
"""framepack on a GPU, in two ways: a matrix product per bucket, all of them in one launch, and no patches in memory; or
patches that are written down in one launch and multiplied by cuBLAS or CUTLASS, a launch per bucket and sample.

Patches are a few megabytes, far less than the weights. On an H200 cuBLAS makes up for them several times over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from talkingdit._native_loader import native
from talkingdit.ops import _matrix_kernels as matrix_kernels
from talkingdit.ops._checks import rows
from talkingdit.ops._framepack_plan import PRODUCTS, plan
from talkingdit.ops._memory import empty

Options = tuple[list[int], list[int], list[int], int]  # frames, counts, kernels, padding
Grids = Sequence[tuple[int, int, int]]


def used_for(latents: Tensor) -> bool:
    """True where the functions below do the work."""
    return latents.is_cuda


def _product(
    product: str,
    latents: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    tokens: Tensor,
    grids: Grids,
    options: Options,
) -> None:
    """``latents``, ``tokens``, or ``weights`` and ``biases`` are written, from the others."""
    frames, counts, kernels, padding = options
    batch, out = latents.shape[0], tokens.shape[2]
    sizes = tuple((batch * t * h * w, out, x.numel() // out) for x, (t, h, w) in zip(weights, grids, strict=True))
    splits, elements = plan(product, sizes, latents.element_size())
    workspace = latents.new_empty(elements, dtype=torch.promote_types(latents.dtype, torch.float32))
    flat = [n for grid in grids for n in grid]
    arguments = (frames, counts, kernels, flat, splits, padding)
    native.framepack_product(PRODUCTS.index(product), latents, weights, biases, tokens, workspace, *arguments)


def project(
    latents: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    grids: Grids,
    options: Options,
    out: Tensor,
    kernel: str,
) -> None:
    """Writes the packed tokens of all buckets to ``out``."""
    if out.numel() == 0:
        return
    packed = [weight.contiguous() for weight in weights]
    if _in_library(latents, packed, kernel):
        _multiply_patches(rows(latents), packed, biases, grids, options, out, _by_library)
    elif _request(latents, packed, biases, out, kernel).cutlass():
        _multiply_patches(rows(latents), packed, biases, grids, options, out, _by_cutlass)
    else:
        _product("project", rows(latents), packed, [bias.contiguous() for bias in biases], out, grids, options)


def _in_library(latents: Tensor, weights: Sequence[Tensor], kernel: str) -> bool:
    """Does cuBLAS multiply? A pooled bucket has nothing to multiply with.

    Raises:
        ValueError: it was asked for and cannot.
    """
    pooled = any(weight.numel() == 0 for weight in weights)
    if kernel == "library" and pooled:
        raise ValueError("framepack: kernel 'library' needs a weight in every bucket")
    return kernel == "library" or (kernel == "auto" and latents.element_size() == 2 and not pooled)


def _by_library(matrix: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    if bias is None:
        torch.mm(matrix[0], weight.T, out=target[0])
    else:
        torch.addmm(bias, matrix[0], weight.T, out=target[0])


def _by_cutlass(matrix: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    native.sm90_product(matrix, matrix_kernels.moved(weight)[None], bias, None, None, None, target, True)


def _request(
    latents: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], out: Tensor, kernel: str
) -> matrix_kernels.ProductRequest:
    sums = [weight.numel() // out.shape[2] for weight in weights]
    found = matrix_kernels.obstacle([latents, *weights, *biases], min(sums), [out])
    if min(sums) == 0 and matrix_kernels.ready(latents.device):
        found = "a weight in every bucket"
    copies = not all(matrix_kernels.movable(weight.flatten(1)) for weight in weights if weight.numel())
    return matrix_kernels.ProductRequest(
        "framepack", kernel, max(sums), out.shape[2], out.element_size(), found, copies
    )


def _multiply_patches(
    latents: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    grids: Grids,
    options: Options,
    out: Tensor,
    multiply: Callable[[Tensor, Tensor, Tensor | None, Tensor], None],
) -> None:
    """``multiply(matrix [1, tokens, taps], weight [out, taps], bias or None, target [1, tokens, out])``, one by one."""
    frames, counts, sizes, padding = options
    batch, tokens = latents.shape[0], [t * h * w for t, h, w in grids]
    sums = [weight[0].numel() for weight in weights]
    pitches = [-(-n // 8) * 8 for n in sums]  # pack_pitch of csrc/core/framepack_gemm.h
    # Zeros, for a library may read what lies between rows (findings/padded_rows_bf16_amx.sh).
    written = latents.new_zeros(sum(batch * count * pitch for count, pitch in zip(tokens, pitches, strict=True)))
    native.framepack_patches(latents, written, frames, counts, sizes, [n for grid in grids for n in grid], padding)
    first = at = 0
    for weight, bias, count, length, pitch in zip(weights, biases, tokens, sums, pitches, strict=True):
        matrices = written[at : at + batch * count * pitch].view(batch, count, pitch)[..., :length]
        at += batch * count * pitch
        shift = bias.contiguous() if bias.numel() else None
        for sample in range(batch if count else 0):
            target = out[sample : sample + 1, first : first + count]
            multiply(matrices[sample : sample + 1], weight.flatten(1), shift, target)
        first += count


def backward(
    grad: Tensor,
    latents: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    grids: Grids,
    options: Options,
    for_latents: bool,
    for_weights: bool,
) -> list[Tensor]:
    """Gradients of latents, weights and biases, in this order; what is not wanted or not there is empty."""
    grad = rows(grad)
    grad_latents = latents.new_empty(0)
    if for_latents:
        grad_latents = empty(latents.shape, latents)
        if grad.numel():
            _product("grad_latents", grad_latents, [x.contiguous() for x in weights], biases, grad, grids, options)
        else:
            grad_latents.zero_()
    grad_weights = [weight.new_empty(weight.shape if for_weights else 0) for weight in weights]
    grad_biases = [bias.new_empty(bias.shape if for_weights else 0) for bias in biases]
    if for_weights:
        for weight, bias, grid in zip(grad_weights, grad_biases, grids, strict=True):
            if min(grid) == 0:  # a bucket without tokens
                weight.zero_()
                bias.zero_()
        if grad.numel():
            _product("grad_weights", rows(latents), grad_weights, grad_biases, grad, grids, options)
    return [grad_latents, *grad_weights, *grad_biases]
