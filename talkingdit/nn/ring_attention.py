# SPDX-License-Identifier: Apache-2.0
"""Attention whose keys and values travel round a ring, piece by piece, with an exact backward.

A piece of the keys gives an output and the logarithm of its softmax denominator; pieces are merged by those (Liu et
al., Ring Attention, arXiv 2310.01889; the merge is that of Dao, FlashAttention-2, arXiv 2307.08691, section 3.1). In
the backward every piece is given the output and the denominator of the whole, which makes its gradients exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from talkingdit.nn import attention_backends, attention_pieces
from talkingdit.nn.context_parallel import Shard, all_to_all
from talkingdit.nn.local_attention import AttentionOptions


def ring_attention(
    q: Tensor, key_value: Tensor, options: AttentionOptions, group: ProcessGroup, chunks: Sequence[Shard]
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the own chunk's queries to all keys of the ring.

    Args:
        q: [chunk, B, H, D].
        key_value: [chunk, 2, B, H, D].
        options: joint q, k, v [B, L, H, D] are of tokens that every rank has; the mask is [B, tokens + L].
        chunks: the tokens of each place in the ring.

    Returns:
        [B, chunk, H, D]; with joint also [B, L, H, D].
    """
    mask, backend, segments, joint = options
    given = (q, key_value, *(joint or ()))
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    backend = attention_backends.choose(backend, q, mask is not None, gradients, ring=True)
    plan = _Plan(group, chunks, segments, backend)
    length, text = len(q), None
    if joint is not None:
        text_q, text_k, text_v = (x.transpose(0, 1) for x in joint)
        q, text = torch.cat((q, text_q)), torch.stack((text_k, text_v), dim=1)
    out: Tensor = _Ring.apply(q, key_value, text, mask, plan)
    out = out.transpose(0, 1)
    return out if joint is None else (out[:, :length], out[:, length:])


class _Plan(NamedTuple):
    group: ProcessGroup
    chunks: Sequence[Shard]
    segments: Sequence[int] | None
    backend: str

    @property
    def rank(self) -> int:
        return self.group.rank()

    def pieces(
        self, source: int, block: Tensor, text: Tensor | None, mask: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """What of the chunk `block` of rank `source` (and, once, of the text) the own queries attend to.

        Yields:
            The rows of the queries, those of the block as a view [M, 2, B, H, D], their part of the mask.
        """
        mine, theirs = self.chunks[self.rank], self.chunks[source]
        if text is not None and source == self.rank:
            yield slice(None), text, None if mask is None else mask[:, self.chunks[-1].end :]
        ends = [self.chunks[-1].end] if self.segments is None else self.segments
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            first, last = max(start, theirs.begin), min(end, theirs.end)
            rows = slice(max(start - mine.begin, 0), max(min(end, mine.end) - mine.begin, 0))
            if text is not None:
                rows = slice(None)  # the text's queries stand behind those of the chunk
            elif rows.start >= rows.stop:
                continue
            if first < last:
                keys = block[first - theirs.begin : last - theirs.begin]
                yield rows, keys, None if mask is None else mask[:, first:last]

    def travel(self, block: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(source, chunk) of all ranks, the own first, then those before it; the next travels meanwhile."""
        for hop in range(len(self.chunks)):
            source = (self.rank - hop) % len(self.chunks)
            following = None if hop + 1 == len(self.chunks) else self.pass_on(block, source)
            yield source, block
            if following is not None:
                block, work = following
                work.wait()

    def pass_on(self, block: Tensor, source: int) -> tuple[Tensor, dist.Work]:
        """Sends what belongs to the chunk of `source` to the next rank; receives the same of the chunk before it."""
        size = len(self.chunks)
        sends, receives = [0] * size, [0] * size
        sends[(self.rank + 1) % size] = len(block)
        receives[(self.rank - 1) % size] = self.chunks[(source - 1) % size].size
        received, work = all_to_all(block, sends, receives, self.group, wait=False)
        assert work is not None
        return received, work


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, key_value: Tensor, text: Tensor | None, mask: Tensor | None, plan: _Plan
    ) -> Tensor:
        queries = q.permute(1, 2, 0, 3)
        rows_out = torch.zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        out = rows_out.permute(1, 2, 0, 3)
        lse = out.new_full(out.shape[:3], attention_pieces.EMPTY)
        extra: attention_pieces.Extra = ()
        for source, block in plan.travel(key_value):
            for rows, keys, allowed in plan.pieces(source, block, text, mask):
                k, v = keys.permute(1, 2, 3, 0, 4)
                part, part_lse, extra = attention_pieces.forward(queries[:, :, rows], k, v, allowed, plan.backend)
                merged_lse = lse[:, :, rows]
                weight = torch.sigmoid(part_lse - merged_lse)
                out[:, :, rows].lerp_(part.to(out.dtype), weight[..., None])
                lse[:, :, rows] = torch.logaddexp(merged_lse, part_lse)
        rows_out = rows_out.to(q.dtype)
        ctx.save_for_backward(q, key_value, text, mask, rows_out, lse, *extra)
        ctx.plan = plan
        return rows_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, key_value, text, mask, rows_out, lse, *extra = ctx.saved_tensors
        plan: _Plan = ctx.plan
        rows_gradient = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        queries, out, grad, of_queries = (
            x.permute(1, 2, 0, 3) for x in (q, rows_out, grad.contiguous(), rows_gradient)
        )
        of_text = None if text is None else torch.zeros(text.shape, dtype=lse.dtype, device=q.device)
        # What a chunk's keys are owed travels round one hop behind the chunk, growing at every rank, until it is home.
        arriving: tuple[Tensor, dist.Work] | None = None
        for source, block in plan.travel(key_value):
            of_block = torch.zeros(block.shape, dtype=lse.dtype, device=q.device)
            pairs = zip(
                plan.pieces(source, block, text, mask), plan.pieces(source, of_block, of_text, mask), strict=True
            )
            for (rows, keys, allowed), (_, of_keys, _) in pairs:
                k, v = keys.permute(1, 2, 3, 0, 4)
                whole = attention_pieces.AttentionPiece(out[:, :, rows], lse[:, :, rows], tuple(extra))
                dq, dk, dv = attention_pieces.backward(
                    grad[:, :, rows], queries[:, :, rows], k, v, allowed, whole, plan.backend
                )
                of_queries[:, :, rows] += dq
                of_keys[:, 0] += dk.permute(2, 0, 1, 3)
                of_keys[:, 1] += dv.permute(2, 0, 1, 3)
            if arriving is not None:
                received, work = arriving
                work.wait()
                of_block += received
            arriving = plan.pass_on(of_block, source)
        assert arriving is not None
        of_chunk, work = arriving
        work.wait()
        text_gradient = None if of_text is None else of_text.to(q.dtype)
        return rows_gradient.to(q.dtype), of_chunk.to(q.dtype), text_gradient, None, None
