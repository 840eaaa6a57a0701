# SPDX-License-Identifier: Apache-2.0
"""The one place through which attention over a whole sequence goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from torch import Tensor

from talkingdit.nn.attention_backends import BACKENDS
from talkingdit.nn.local_attention import AttentionOptions, Joint, attend

if TYPE_CHECKING:
    from talkingdit.nn.context_parallel import ContextParallel


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
        backend: "auto" takes the fastest exact kernel, see `talkingdit.nn.attention_backends`; "flash", "efficient",
            "cudnn" and "math" name one of PyTorch's, "flash3", "flash3_fp8" and "sage" one of a library.
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
        ValueError: for an unknown backend or one that this device or installation does not have, shapes that do not
            fit, segments that do not cover the sequence, segments with joint, a number of heads that the ulysses ranks
            do not divide.
    """
    options = AttentionOptions(mask, backend, segments, joint)
    if context is None:
        _check(q, k, options, k.shape[1])
        return attend(q, k, v, options)
    if tokens is None:
        raise ValueError("attention: with context, tokens must be the length of the whole sequence, got None")
    _check(q, k, options, tokens, context)
    _check_shards((q, k, v), tokens, context)
    if context.size == 1:
        return attend(q, k, v, options)
    # Imported here: it brings the compiler in, which takes a second.
    from talkingdit.nn.sharded_attention import sharded_attention

    return sharded_attention(q, k, v, options, context, tokens)


def _check(
    q: Tensor, k: Tensor, options: AttentionOptions, tokens: int, context: ContextParallel | None = None
) -> None:
    """Do the options fit q, k and each other, in a sequence with keys of `tokens` tokens?"""
    mask, backend, segments, joint = options
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"attention: backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
    batch, _, heads, dim = k.shape
    keys = tokens
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
        if not rising or segments[-1] != tokens or (context is None and q.shape[1] != tokens):
            raise ValueError(
                f"attention: segments must be rising ends of samples, the last one the sequence's length {tokens}, "
                f"and q as long, got {list(segments)} and {q.shape[1]} queries"
            )


def _check_shards(qkv: tuple[Tensor, Tensor, Tensor], tokens: int, context: ContextParallel) -> None:
    """Are q, k and v this rank's shards of a sequence of `tokens` tokens, with heads that divide?"""
    own, heads = context.shard(tokens).size, qkv[1].shape[2]
    for name, x in zip(("q", "k", "v"), qkv, strict=True):
        if x.shape[1] != own:
            raise ValueError(
                f"attention: {name} must have the {own} of {tokens} tokens that are the shard of rank {context.rank} "
                f"of {context.size}, got {x.shape[1]}"
            )
    if heads % context.ulysses_size:
        raise ValueError(
            f"attention: the number of heads must be divisible by the {context.ulysses_size} ulysses ranks, got {heads}"
        )
