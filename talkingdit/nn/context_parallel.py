# SPDX-License-Identifier: Apache-2.0
"""One sequence over several ranks: who holds which tokens, and the collectives that move them.

Everything in a transformer block but attention works token by token, so a rank computes its own contiguous shard of the
sequence alone. Attention needs all keys. Two ways of getting them are combined, one per axis of a mesh:

- Ulysses (Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509, section 3): an all-to-all gives every rank all tokens of
  its axis for a part of the heads. Volume falls with the number of ranks; heads must divide.
- the ring axis: keys and values of the other ranks are gathered, or travel round a ring (Liu et al., Ring Attention,
  arXiv 2310.01889, section 3). Volume does not fall with the number of ranks; any number of heads.

All collectives here are exact adjoints of each other in forward and backward. `talkingdit.nn.attention.attention` uses
them; a model needs `ContextParallel.shard`, `split` and `gather`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

MODES = ("gather", "ring")

P = ParamSpec("P")
R = TypeVar("R")

# The older name warns from torch 2.13 on, the newer is not there before.
_all_gather_into = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function with collectives out of compiled graphs.

    Traced, their backward is ordered by the compiler while FSDP's reductions are issued by hooks outside of the graph,
    and the two orders have been seen to differ between ranks, which is a hang. `torch.compiler.disable` as a decorator
    would import the compiler, which takes longer than all of torch, also where nothing is compiled.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            from talkingdit.nn.uncompiled import call

            return call(function, *args, **kwargs)
        return function(*args, **kwargs)

    return run


class Shard(NamedTuple):
    """A contiguous range of tokens."""

    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share a sequence, as a grid of ring x ulysses.

    Attributes:
        ulysses: the ranks that trade tokens for heads; None for one rank. They should be near: one node.
        ring: the ranks that exchange keys and values; None for one rank.
        group: all of them; rank in group = rank in ring * size of ulysses + rank in ulysses.
        mode: "gather" collects all keys and values of the ring axis at once: two collectives of the fewest bytes, and
            attention in one piece. "ring" lets them travel while attention is computed piece by piece: a rank holds
            three shards of them at a time, not all, but the backward moves about twice the bytes.

    Raises:
        ValueError: for another mode, or groups whose sizes do not multiply.
    """

    ulysses: ProcessGroup | None
    ring: ProcessGroup | None
    group: ProcessGroup
    mode: str = "gather"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"ContextParallel: mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.size != self.ulysses_size * self.ring_size:
            raise ValueError(
                f"ContextParallel: group must have ring x ulysses = {self.ring_size} x {self.ulysses_size} ranks, "
                f"got {self.size}"
            )

    @staticmethod
    def from_mesh(mesh: DeviceMesh, mode: str = "gather") -> ContextParallel:
        """From a DeviceMesh with the dimensions ("ring", "ulysses").

        The communicators are those of the mesh, so where an axis spans the same ranks as FSDP they share one. Its
        collectives then run one after the other: an exchange of attention may wait for a parameter gather that was
        issued before it. A communicator of its own would let both run at once, which NVIDIA warns can deadlock
        (NCCL user guide, "Using multiple NCCL communicators concurrently"). Whoever has measured that it pays passes
        such groups to the constructor.

        Raises:
            ValueError: for a mesh with other dimensions.
        """
        if mesh.mesh_dim_names != ("ring", "ulysses"):
            raise ValueError(
                f"ContextParallel: mesh must have the dimensions ('ring', 'ulysses'), got {mesh.mesh_dim_names}"
            )
        ring, ulysses = (mesh.get_group(name) if mesh[name].size() > 1 else None for name in ("ring", "ulysses"))
        if ring is not None and ulysses is not None:
            return ContextParallel(ulysses, ring, mesh._flatten().get_group(), mode)
        return ContextParallel(ulysses, ring, mesh.get_group("ulysses" if ring is None else "ring"), mode)

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def ulysses_size(self) -> int:
        return 1 if self.ulysses is None else self.ulysses.size()

    @property
    def ring_size(self) -> int:
        return 1 if self.ring is None else self.ring.size()

    @property
    def ulysses_rank(self) -> int:
        return self.rank % self.ulysses_size

    @property
    def ring_rank(self) -> int:
        return self.rank // self.ulysses_size

    def shard(self, tokens: int, rank: int | None = None) -> Shard:
        """The tokens of a rank (None: of this one) in a sequence of `tokens`.

        Sizes differ by at most one, the larger ones first. With fewer tokens than ranks the last ranks have none.
        """
        rank = self.rank if rank is None else rank
        size, larger = divmod(tokens, self.size)
        return Shard(rank * size + min(rank, larger), (rank + 1) * size + min(rank + 1, larger))

    def chunk(self, tokens: int, ring_rank: int | None = None) -> Shard:
        """The tokens of all ulysses ranks at one place of the ring (None: at this rank's place)."""
        first = (self.ring_rank if ring_rank is None else ring_rank) * self.ulysses_size
        return Shard(self.shard(tokens, first).begin, self.shard(tokens, first + self.ulysses_size - 1).end)


def split(x: Tensor, context: ContextParallel, tokens: int, dim: int = 1) -> Tensor:
    """This rank's shard of a tensor that every rank has whole: a view.

    Raises:
        ValueError: if x has another number of tokens.
    """
    _check_length("split", x, tokens, dim)
    begin, end = context.shard(tokens)
    return x.narrow(dim, begin, end - begin)


@eager
def gather(x: Tensor, context: ContextParallel, tokens: int, dim: int = 1) -> Tensor:
    """The whole of a tensor of which every rank has its shard, on every rank.

    For the output of a model: all ranks compute the same loss from the whole, and the backward takes the gradient of
    the own shard alone. Gradients of parameters then are the sum over the ranks of `context`.

    Args:
        x: this rank's shard, shard(tokens).size along `dim`; the other sizes are the same on all ranks.

    Raises:
        ValueError: if x has another number of tokens.
    """
    _check_length("gather", x, context.shard(tokens).size, dim)
    sizes = [context.shard(tokens, rank).size for rank in range(context.size)]
    rows: Tensor = _Gather.apply(x.movedim(dim, 0), sizes, context.group, False)
    return rows.movedim(0, dim)


def exchange(rows: Tensor, sends: list[int], receives: list[int], group: ProcessGroup) -> Tensor:
    """All-to-all of rows, differentiable: sends[r] of them go to rank r, in order, receives[r] come from it.

    Args:
        rows: [sum(sends), ...].

    Returns:
        [sum(receives), ...], ordered by where the rows came from.
    """
    out: Tensor = _Exchange.apply(rows, sends, receives, group)
    return out


def gather_rows(rows: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
    """The rows of all ranks, differentiable: the backward sums over the ranks what each wants of a row.

    Args:
        rows: [sizes[own rank], ...].
        sizes: rows of every rank.

    Returns:
        [sum(sizes), ...].
    """
    out: Tensor = _Gather.apply(rows, sizes, group, True)
    return out


def all_to_all(
    rows: Tensor, sends: list[int], receives: list[int], group: ProcessGroup, wait: bool = True
) -> tuple[Tensor, dist.Work | None]:
    """As `exchange`, not differentiable; without `wait` the result is complete after work.wait()."""
    out = rows.new_empty(sum(receives), *rows.shape[1:])
    even = len({*sends, *receives}) == 1  # has a faster way of its own in NCCL
    into, outof = (None, None) if even else (receives, sends)
    return out, dist.all_to_all_single(out, rows.contiguous(), into, outof, group=group, async_op=not wait)


def _all_gather(rows: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
    most = max(sizes)
    if len(rows) < most:  # the collective wants equal shards; what stands behind the own rows is dropped again
        rows, own = rows.new_empty(most, *rows.shape[1:]), rows
        rows[: len(own)] = own
    out = rows.new_empty(len(sizes) * most, *rows.shape[1:])
    _all_gather_into(out, rows.contiguous(), group=group)
    end = sizes[0]
    for rank, size in enumerate(sizes[1:], start=1):
        if end < rank * most:  # close the gaps in place: a second copy of all rows may be what does not fit
            out[end : end + size] = out[rank * most : rank * most + size].clone()
        end += size
    return out[:end]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sends: list[int], receives: list[int], group: ProcessGroup) -> Tensor:
        ctx.args = sends, receives, group
        return all_to_all(rows, sends, receives, group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sends, receives, group = ctx.args
        return all_to_all(grad, receives, sends, group)[0], None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: ProcessGroup, total: bool) -> Tensor:
        ctx.args = sizes, group, total
        return _all_gather(rows, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sizes, group, total = ctx.args
        rank = group.rank()
        if not total:
            begin = sum(sizes[:rank])
            return grad[begin : begin + sizes[rank]], None, None, None
        # A reduce-scatter would round to grad's dtype at every addition. This moves as many bytes and rounds once; it
        # also takes uneven shards as they are.
        parts, _ = all_to_all(grad, sizes, [sizes[rank]] * len(sizes), group)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        return parts.unflatten(0, (len(sizes), sizes[rank])).sum(0, dtype=dtype).to(grad.dtype), None, None, None


def _check_length(name: str, x: Tensor, expected: int, dim: int) -> None:
    if x.shape[dim] != expected:
        raise ValueError(f"{name}: x must have {expected} tokens in dimension {dim}, got {x.shape[dim]}")
