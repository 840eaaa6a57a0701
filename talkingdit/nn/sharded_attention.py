# SPDX-License-Identifier: Apache-2.0
"""Attention over a sequence that several ranks share: Ulysses around either gathered keys or a ring.

With U ulysses ranks, R places in the ring and M = B * tokens * H * D elements in the whole q, a rank sends

    forward    4 (M / RU) (U - 1) / U  +  2 (M / U) (R - 1) / R      elements
    backward   the same; in "ring" mode 2 M / U more, and those in float32

Inside, tensors have rows first, [tokens, B, H / U, D], because collectives cut along the first axis and take uneven
shards as they are: nothing is padded but keys that are gathered from chunks of different lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from talkingdit.nn.context_parallel import ContextParallel, eager, exchange, gather_rows
from talkingdit.nn.local_attention import AttentionOptions, Joint, attend
from talkingdit.nn.ring_attention import ring_attention


@eager
def sharded_attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, context: ContextParallel, tokens: int
) -> Tensor | tuple[Tensor, Tensor]:
    """`talkingdit.nn.attention.attention` with a context; arguments are checked there."""
    with torch.autocast(q.device.type, enabled=False):
        queries, key_value = _tokens_for_heads(q, k, v, context, tokens)
        if options.joint is not None:
            options = options._replace(joint=_own_heads(options.joint, context))
        chunks = [context.chunk(tokens, place) for place in range(context.ring_size)]
        begin = chunks[context.ring_rank].begin
        if context.ring is not None and context.mode == "ring":
            out = ring_attention(queries, key_value, options, context.ring, chunks)
        else:
            if context.ring is not None:
                key_value = gather_rows(key_value, [chunk.size for chunk in chunks], context.ring)
            k, v = (x.transpose(0, 1) for x in key_value.unbind(1))
            out = attend(queries.transpose(0, 1), k, v, options, begin)
            del k, v
        del queries, key_value
        if isinstance(out, tuple):
            return _heads_for_tokens(out[0], context, tokens), _all_heads(out[1], context)
        return _heads_for_tokens(out, context, tokens)


def _tokens_for_heads(q: Tensor, k: Tensor, v: Tensor, context: ContextParallel, tokens: int) -> tuple[Tensor, Tensor]:
    """This rank's tokens with all heads -> all tokens of its ulysses group with its part of the heads.

    Returns:
        Queries [chunk, B, H / U, D]; keys and values [chunk, 2, B, H / U, D].
    """
    if context.ulysses is None:
        return q.transpose(0, 1), torch.stack((k.transpose(0, 1), v.transpose(0, 1)), dim=1)
    ranks = context.ulysses_size
    # [U, n, 3, B, H / U, D], the one copy: rank by rank, what goes there.
    sent = torch.stack([x.unflatten(2, (ranks, -1)).permute(2, 1, 0, 3, 4) for x in (q, k, v)], dim=2)
    rows = exchange(sent.flatten(0, 1), [q.shape[1]] * ranks, _sizes(context, tokens), context.ulysses)
    return rows[:, 0], rows[:, 1:]


def _heads_for_tokens(out: Tensor, context: ContextParallel, tokens: int) -> Tensor:
    """The way back: [B, chunk, H / U, D] -> [B, n, H, D]."""
    if context.ulysses is None:
        return out
    ranks, own = context.ulysses_size, context.shard(tokens).size
    rows = exchange(out.transpose(0, 1), _sizes(context, tokens), [own] * ranks, context.ulysses)
    return rows.unflatten(0, (ranks, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)


def _own_heads(joint: Joint, context: ContextParallel) -> Joint:
    """Of tokens that every rank has, the heads that this rank attends with, [B, L, H / U, D]."""
    heads = joint[0].shape[2] // context.ulysses_size
    q, k, v = (x.narrow(2, context.ulysses_rank * heads, heads) for x in joint)
    return q, k, v


def _all_heads(out: Tensor, context: ContextParallel) -> Tensor:
    """[B, L, H / U, D] of every ulysses rank -> [B, L, H, D] on every rank."""
    if context.ulysses is None:
        return out
    rows = gather_rows(out.permute(2, 0, 1, 3), [out.shape[2]] * context.ulysses_size, context.ulysses)
    return rows.permute(1, 2, 0, 3)


def _sizes(context: ContextParallel, tokens: int) -> list[int]:
    """Tokens of each rank of the own ulysses group."""
    first = context.ring_rank * context.ulysses_size
    return [context.shard(tokens, first + rank).size for rank in range(context.ulysses_size)]
