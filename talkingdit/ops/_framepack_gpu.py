# SPDX-License-Identifier: Apache-2.0
"""framepack on a GPU: a matrix product per bucket, all of them in one launch, and no patches in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from talkingdit._native_loader import native
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
    latents: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], grids: Grids, options: Options, out: Tensor
) -> None:
    """Writes the packed tokens of all buckets to ``out``."""
    if out.numel():
        packed = [weight.contiguous() for weight in weights]
        _product("project", rows(latents), packed, [bias.contiguous() for bias in biases], out, grids, options)


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
