# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes of all live tensors while code runs, also where tensors are fake and the machine is too small.

What it sees is what a caching allocator hands out, without the allocator's rounding and fragmentation and without the
workspaces inside of library calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within the context every storage that an operator makes counts from its creation to its death.

    Attributes:
        live: bytes now.
        peak: most bytes at once since the beginning, or since `reset`.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        """`known` tensors (weights, inputs) count as live from the beginning."""
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.finalize[..., Any]] = {}
        for tensor in known:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._seen[key] = weakref.finalize(storage, self._remove, key, size)
        self._seen[key].atexit = False

    def _remove(self, key: int, size: int) -> None:
        del self._seen[key]
        self.live -= size

    def reset(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value)
        return result
