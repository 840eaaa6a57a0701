# SPDX-License-Identifier: Apache-2.0
"""Chunks of finished frames or latents in a row, each blended over the end of the one before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from talkingdit.pipelines.plans import Ramp, blend_curve

__all__ = ["blend_chunks", "blended", "lay_over"]


def lay_over(older: Tensor, newer: Tensor, weights: Tensor) -> Tensor:
    """w newer + (1 - w) older over the frames of both.

    Args:
        older, newer: [C, o, H, W] of one dtype.
        weights: [o] float64.

    Returns:
        [C, o, H, W], rounded once.
    """
    wide = torch.promote_types(newer.dtype, torch.float32)
    rise = weights.to(device=newer.device, dtype=wide)[:, None, None]
    return (rise * newer.to(wide) + (1 - rise) * older.to(wide)).to(newer.dtype)


def blended(chunks: Iterable[Tensor], overlap: int, ramp: Ramp = "linear") -> Iterator[Tensor]:
    """Frames as they become final; arguments as of :func:`blend_chunks`, whose result they make up."""
    tail: Tensor | None = None
    curve = blend_curve(overlap, ramp)
    for index, chunk in enumerate(chunks):
        if overlap < 0 or chunk.shape[1] <= overlap:
            raise ValueError(
                f"blend_chunks: overlap must be 0 to {chunk.shape[1] - 1} for the {chunk.shape[1]} frames of "
                f"chunk {index}, got {overlap}"
            )
        if tail is not None and (chunk.shape[0], *chunk.shape[2:]) != (tail.shape[0], *tail.shape[2:]):
            raise ValueError(
                f"blend_chunks: chunk {index} must be [C, f, H, W] like the others, got shape {tuple(chunk.shape)}"
            )
        end = chunk.shape[1] - overlap
        if tail is None:
            yield chunk[:, :end]
        else:
            head = lay_over(tail, chunk[:, :overlap], curve)
            joined = torch.cat([head, chunk[:, overlap:]], dim=1)
            yield joined[:, :end]
            chunk = joined
        tail = chunk[:, end:]
    if tail is not None:
        yield tail


def blend_chunks(chunks: Iterable[Tensor], overlap: int, ramp: Ramp = "linear") -> Tensor:
    """Decoded or denoised chunks in a row, each blended over the last frames so far (EchoMimicV3, in pixels).

    Args:
        chunks: [C, f_i, H, W] each, of one dtype and more than `overlap` frames.
        overlap: frames that neighbours share.
        ramp: weight of the newer chunk, see `plans.blend_curve`; ``"open"`` is EchoMimicV3's older one.

    Returns:
        [C, sum of f_i - (n - 1) overlap, H, W].

    Raises:
        ValueError: there is no chunk, one is too short, or shapes differ.
    """
    parts = list(blended(chunks, overlap, ramp))
    if not parts:
        raise ValueError("blend_chunks: expected at least one chunk, got none")
    return torch.cat(parts, dim=1)
