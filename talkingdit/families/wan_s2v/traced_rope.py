# SPDX-License-Identifier: Apache-2.0
"""Places of tokens in a form that torch.compile can hold. Only what is being compiled imports this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from talkingdit.families.wan_s2v.rope import head_split
from talkingdit.ops import RopeLayout


@torch.compiler.assume_constant_result
def _length(make: Callable[..., RopeLayout], *place: Any) -> int:
    return len(make(*place))


@torch.compiler.assume_constant_result
def _tables(
    make: Callable[..., RopeLayout], device: torch.device, dtype: torch.dtype, *place: Any
) -> tuple[Tensor, Tensor]:
    return make(*place).tables(device, dtype)


class TracedLayout(RopeLayout):
    """A layout that the compiler can hold: its tables are constants of the graph, its sizes plain numbers.

    Args:
        make: a plain function that makes the layout, the same one of the same arguments.
        head_dim: channels per head.
        place: arguments of `make`, plain numbers and tuples.
    """

    def __init__(self, make: Callable[..., RopeLayout], head_dim: int, *place: Any):
        self.make, self.place = make, place
        self.split = head_split(head_dim)
        self.pairs = [channels // 2 for channels in self.split]
        self.dim = sum(self.split)
        self.pairing = "interleaved"
        self.length = _length(make, *place)

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _tables(self.make, device, dtype, *self.place)
