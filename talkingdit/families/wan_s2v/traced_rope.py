# SPDX-License-Identifier: Apache-2.0
"""Places of tokens in a form that torch.compile can hold. Only what is being compiled imports this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from talkingdit.families.wan_s2v.rope import head_split, layout_at
from talkingdit.ops import RopeLayout


@torch.compiler.assume_constant_result
def _length(*place: Any) -> int:
    return len(layout_at(*place))


@torch.compiler.assume_constant_result
def _tables(device: torch.device, dtype: torch.dtype, *place: Any) -> tuple[Tensor, Tensor]:
    return layout_at(*place).tables(device, dtype)


class TracedLayout(RopeLayout):
    """A layout that the compiler can hold: its tables are constants of the graph, its sizes plain numbers."""

    def __init__(self, *place: Any):
        self.place = place
        self.split = head_split(place[1])
        self.pairs = [channels // 2 for channels in self.split]
        self.dim = sum(self.split)
        self.pairing = "interleaved"
        self.length = _length(*place)

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _tables(device, dtype, *self.place)
