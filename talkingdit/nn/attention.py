# SPDX-License-Identifier: Apache-2.0
"""The one place through which attention over a whole sequence goes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from talkingdit.nn.context_parallel import ContextParallel

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

Joint = tuple[Tensor, Tensor, Tensor]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
    context: ContextParallel | None = None,
    tokens: int | None = None,
    segments: Sequence[int] | None = None,
    joint: None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
    context: ContextParallel | None = None,
    tokens: int | None = None,
    segments: None = None,
    joint: Joint,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
    context: ContextParallel | None = None,
    tokens: int | None = None,
    segments: Sequence[int] | None = None,
    joint: Joint | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, scale D ** -0.5.

    With `context`, q, k and v are this rank's shard of a longer sequence, and the result is this rank's shard of what
    a single process would compute; so are gradients. All ranks of the context must make the same calls, and run
    backward through the result. This part is left out of compiled graphs.

    Args:
        q: [B, N, H, D].
        k, v: [B, M, H, D].
        mask: bool [B, M], true where a key may be attended; None attends all. Every sample needs one such key.
        backend: "auto" lets PyTorch choose; "flash", "efficient", "cudnn" and "math" name one of its kernels.
        context: the ranks that share the sequence; N = M = context.shard(tokens).size then.
        tokens: length of the whole sequence, with context; the mask is [B, tokens] then, the same on all ranks.
        segments: ends of the samples packed one behind the other in the (whole) sequence, rising, the last one its
            length. Every sample attends to itself only.
        joint: q, k, v of L more tokens [B, L, H, D], such as the text of MM-DiT (Esser et al., arXiv 2403.03206,
            section 4), that attend and are attended together with the sequence. With context every rank has all of
            them. The mask, if any, has L more columns at the end.

    Returns:
        [B, N, H, D] in q's dtype; with joint also that of its tokens, [B, L, H, D].

    Raises:
        ValueError: for an unknown backend, shapes that do not fit, segments that do not cover the sequence, segments
            with joint, a number of heads that the ulysses ranks do not divide.
    """
    _check(q, k, v, mask, backend, context, tokens, segments, joint)
    if context is None or context.size == 1:
        return attend(q, k, v, mask, backend, segments, joint)
    # Imported here: it brings the compiler in, which takes a second.
    from talkingdit.nn.sharded_attention import sharded_attention

    assert tokens is not None
    return sharded_attention(q, k, v, mask, backend, context, tokens, segments, joint)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    backend: str,
    segments: Sequence[int] | None,
    joint: Joint | None,
    begin: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of queries that stand at `begin` of the sequence of the keys, in this process."""
    if joint is not None:
        length = q.shape[1]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), joint, strict=True))
        out = _scaled_dot_product(q, k, v, mask, backend)
        return out[:, :length], out[:, length:]
    if segments is None:
        return _scaled_dot_product(q, k, v, mask, backend)
    parts = []
    for start, end in zip([0, *segments[:-1]], segments, strict=True):
        queries = slice(max(start - begin, 0), max(end - begin, 0))
        if q[:, queries].shape[1]:
            keys = None if mask is None else mask[:, start:end]
            parts.append(_scaled_dot_product(q[:, queries], k[:, start:end], v[:, start:end], keys, backend))
    return torch.cat(parts, dim=1) if parts else _scaled_dot_product(q, k, v, mask, backend)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """q [B, N, H, D], k and v [B, M, H, D], mask bool [B, M] -> [B, N, H, D]."""
    dtype = q.dtype
    if q.is_cpu and dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled():
        # The CPU's backward in half precision is slower than in float32, seven times with few keys.
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[:, None, None, :]
    with torch.autocast(q.device.type, enabled=False), _choice(backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).to(dtype)


def _choice(backend: str) -> AbstractContextManager[None]:
    return nullcontext() if backend == "auto" else sdpa_kernel(_BACKENDS[backend])


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    backend: str,
    context: ContextParallel | None,
    tokens: int | None,
    segments: Sequence[int] | None,
    joint: Joint | None,
) -> None:
    if backend != "auto" and backend not in _BACKENDS:
        raise ValueError(f"attention: backend must be auto or one of {', '.join(_BACKENDS)}, got {backend!r}")
    batch, keys, heads, dim = k.shape
    if context is not None:
        if tokens is None:
            raise ValueError("attention: with context, tokens must be the length of the whole sequence, got None")
        own = context.shard(tokens).size
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.shape[1] != own:
                raise ValueError(
                    f"attention: {name} must have the {own} of {tokens} tokens that are rank {context.rank}'s share "
                    f"of {context.size}, got {x.shape[1]}"
                )
        if heads % context.ulysses_size:
            raise ValueError(
                f"attention: the number of heads must be divisible by the {context.ulysses_size} ulysses ranks, "
                f"got {heads}"
            )
        keys = tokens
    length = keys
    if joint is not None:
        if segments is not None:
            raise ValueError("attention: segments cannot be combined with joint, whose tokens belong to no sample")
        for name, x in zip(("q", "k", "v"), joint, strict=True):
            if x.shape != (batch, joint[0].shape[1], heads, dim):
                raise ValueError(
                    f"attention: joint {name} must be [{batch}, L, {heads}, {dim}] with one L, got {tuple(x.shape)}"
                )
        keys += joint[0].shape[1]
    if mask is not None and mask.shape != (batch, keys):
        raise ValueError(f"attention: mask must have the shape of the keys {(batch, keys)}, got {tuple(mask.shape)}")
    if segments is not None:
        rising = bool(segments) and all(a < b for a, b in zip([0, *segments[:-1]], segments, strict=True))
        if not rising or segments[-1] != length or (context is None and q.shape[1] != length):
            raise ValueError(
                f"attention: segments must be rising ends of samples, the last one the sequence's length {length}, "
                f"and q as long, got {list(segments)} and {q.shape[1]} queries"
            )
