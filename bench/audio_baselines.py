# SPDX-License-Identifier: Apache-2.0
"""Ways to attend from video tokens to the audio tokens of their own latent frame with what PyTorch has.

All take q [B, F * S, H, D] and k, v [B, F, A, H, D] and give [B, F * S, H, D].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def by_frame(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frames become the batch: [B * F, H, tokens, D]. No mask is needed then, which is how official code does it."""
    frames = k.shape[0] * k.shape[1]
    split = q.reshape(frames, -1, *q.shape[2:])
    return split.transpose(1, 2), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch chooses the backend."""
    return F.scaled_dot_product_attention(*by_frame(q, k, v)).transpose(1, 2).reshape(q.shape)


def sdpa_with(name: str) -> Attention:
    """One of PyTorch's backends and no other; it raises RuntimeError where it cannot."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return sdpa(q, k, v)

    return run


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax written out."""
    split, keys, values = by_frame(q, k, v)
    scores = split @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (torch.softmax(scores.float(), dim=-1).to(q.dtype) @ values).transpose(1, 2).reshape(q.shape)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flex_attention with frames as batch; to be compiled."""
    result: Any = flex_attention(*by_frame(q, k, v))
    return result.transpose(1, 2).reshape(q.shape)


@lru_cache(maxsize=4)
def _block_diagonal(frames: int, per_frame: int, audio: int, device: torch.device) -> Any:
    def same_frame(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // per_frame == key // audio

    return create_block_mask(same_frame, None, None, frames * per_frame, frames * audio, device=device)


def flex_blocks(frames: int, per_frame: int, audio: int, device: torch.device) -> Attention:
    """flex_attention over the whole sequence with a block-diagonal mask, made on the first call; to be compiled."""
    mask = _block_diagonal(frames, per_frame, audio, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = q.transpose(1, 2), k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)
        result: Any = flex_attention(*whole, block_mask=mask)
        return result.transpose(1, 2)

    return run
