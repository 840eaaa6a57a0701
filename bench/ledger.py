# SPDX-License-Identifier: Apache-2.0
"""A book of what a process sends and holds, kept while its program runs in a process group that has no wires."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class SentByRank:
    """What rank 0 sends in all collectives of one kind and group, per step.

    Attributes:
        kind: "all-gather", "reduce-scatter", "all-reduce" or "all-to-all".
        ranks: in the group; `nodes` that they are spread over.
        calls: of the collective.
        bytes: by the algorithms that send least: rings for the first three, direct messages for the last.
        outside: of these, what leaves the node by a GPU's own link. A ring crosses from node to node once for all of
            its ranks there, and there are as many rings as links, so it is 1 / (ranks per node) of it.
    """

    kind: str
    ranks: int
    nodes: int
    calls: int = 0
    bytes: float = 0.0
    outside: float = 0.0


_KINDS = {
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "_allgather_base": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall_base": "all-to-all",
    "all_to_all": "all-to-all",
}


_CPU = torch.device("cpu")


class Ledger(TorchDispatchMode):
    """Within the context, every storage that comes, changes its size or goes, and every collective.

    Args:
        gpus: ranks per node.
        card: device of the tensors that lie on the card; those of any other lie on the host.
    """

    def __init__(self, gpus: int, card: torch.device = _CPU) -> None:
        super().__init__()
        self.gpus, self.card = gpus, card
        self.events: list[tuple[int, int]] = []  # (number of a storage, change of its bytes)
        self.marks: dict[str, int] = {}  # name of a moment: events before it
        self.whole: set[int] = set()  # storages of gathered parameters, and of gradients on their way
        self.host: set[int] = set()  # storages that lie on the host
        self.sent: dict[tuple[str, int, int], SentByRank] = {}
        self._size: dict[int, int] = {}
        self._number: dict[int, int] = {}
        self._patch: Any = None

    def __enter__(self) -> Ledger:
        resize = torch.UntypedStorage.resize_

        def noted(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            # FSDP frees gathered parameters, and takes memory for them again, in this way.
            number = self._number.get(storage._cdata)
            if number is not None:
                self.whole.add(number)
                self._change(number, storage.nbytes())
            return result

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", noted)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
        super().__exit__(*error)

    def number(self, tensor: Tensor) -> int:
        """Of the storage of a tensor, which is new if it was not seen before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._number:
            number = self._number[key] = len(self._size)
            self._size[number] = 0
            if tensor.device != self.card:
                self.host.add(number)
            self._change(number, storage.nbytes())
            weakref.finalize(storage, self._gone, key, number).atexit = False
        return self._number[key]

    def _change(self, number: int, size: int) -> None:
        if size != self._size[number]:
            self.events.append((number, size - self._size[number]))
            self._size[number] = size

    def _gone(self, key: int, number: int) -> None:
        del self._number[key]
        self._change(number, 0)

    def mark(self, moment: str) -> None:
        self.marks[moment] = len(self.events)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, with the local tensors
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.number(value)
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and name.rstrip("_") in _KINDS:
            self._collective(_KINDS[name.rstrip("_")], args)
        elif space == "fsdp":  # shards into what is gathered, that into parameters, gradients into what is reduced
            given = tree_leaves((args, kwargs, result))
            self.whole.update(self.number(value) for value in given if isinstance(value, Tensor))
        return result

    def _collective(self, kind: str, args: tuple[Any, ...]) -> None:
        tensors = [value for value in tree_leaves(args[:2]) if isinstance(value, Tensor)]
        group = next(_group(value) for value in args if _group(value) is not None)
        ranks = dist.get_process_group_ranks(group)
        size, place = len(ranks), ranks[0] // self.gpus
        nodes = len({rank // self.gpus for rank in ranks})
        within = sum(rank // self.gpus == place for rank in ranks)
        if size == 1:
            return
        if kind == "all-to-all":
            rows = tensors[1]
            splits = next((list(v) for v in args[4:5] if v), None) or [len(rows) // size] * size
            row = rows.nbytes / max(1, len(rows))
            sent = row * (sum(splits) - splits[0])
            outside = row * sum(n for n, rank in zip(splits, ranks, strict=True) if rank // self.gpus != place)
        else:
            sent = max(t.nbytes for t in tensors) * (size - 1) / size * (2 if kind == "all-reduce" else 1)
            outside = sent / within if nodes > 1 else 0.0
        entry = self.sent.setdefault((kind, size, nodes), SentByRank(kind, size, nodes))
        entry.calls += 1
        entry.bytes += sent
        entry.outside += outside


def _group(value: Any) -> dist.ProcessGroup | None:
    """The process group that an argument of a collective names."""
    if isinstance(value, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(value)
        except (RuntimeError, TypeError):
            return None
    if isinstance(value, dist.ProcessGroup):
        return value
    if isinstance(value, str):
        name: Any = value
        try:
            return dist.distributed_c10d._resolve_process_group(name)
        except (RuntimeError, ValueError, KeyError):
            return None
    return None


@contextmanager
def cluster(world: int) -> Iterator[None]:
    """A process group of `world` ranks of which this process is rank 0; nothing that is sent arrives."""
    if dist.is_initialized():
        raise RuntimeError("bench: counting needs a process group of its own, and there is one already")
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
