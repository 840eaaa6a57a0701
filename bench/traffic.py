# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes that operators read and write, also where tensors are fake.

Every operator that is not a view reads each tensor it is given once and writes each result once: what eager execution
moves at least when nothing stays in a cache between operators. What an operator reads again inside is not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that only allocate, or are views that do not say so.
_FREE = (
    "aten::empty",
    "aten::new_empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
    "prim::device",  # asked of fake tensors as an operator
)


def _bytes(value: Any) -> int:
    """Of all tensors in a value; an expanded one is as large as what it is a view of."""
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tree_leaves(value) if isinstance(t, Tensor))


class Traffic(TorchDispatchMode):
    """Within the context what operators read and write is added up.

    Attributes:
        by_operator: bytes, by names such as "aten::mul".
        calls: of operators that moved something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def moved(self) -> int:
        return self.by_operator.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        # A view gives a result that shares memory with an argument it does not write.
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if view or schema.name in _FREE:
            return result
        moved = 0
        named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
        for argument in schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            ours = schema.name.startswith("talkingdit::") and not named.get("add")  # add: into what is there
            overwritten = written and (argument.is_out or ours or schema.name == "aten::copy_")
            # What is overwritten is not read; what is changed in place is read and written.
            moved += _bytes(named.get(argument.name)) * (1 if overwritten else 2 if written else 1)
        results = () if not schema.returns else (result,) if len(schema.returns) == 1 else result
        for returned, value in zip(schema.returns, results, strict=True):
            if returned.alias_info is None:
                moved += _bytes(value)
        self.by_operator[schema.name] += moved
        self.calls[schema.name] += moved > 0
        return result
