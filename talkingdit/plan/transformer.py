# SPDX-License-Identifier: Apache-2.0
"""The transformer that is planned: its configuration with what its family knows of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from talkingdit.plan.clip import ClipShape
from talkingdit.plan.cost import Cost, Parameter, PlannedFamily

if TYPE_CHECKING:
    import torch

    from talkingdit.nn.units import Units
    from talkingdit.pipelines.memory import Memory


@dataclass(frozen=True)
class Transformer:
    """A configuration and its family's costs and units. Made by `of`; nothing is loaded."""

    config: Mapping[str, Any]
    cost: Cost
    units: Units

    @staticmethod
    def of(family: PlannedFamily, config: Mapping[str, Any]) -> Transformer:
        """A family's transformer of these arguments; those that are not said have their defaults."""
        return Transformer(family.cost.complete(config), family.cost, family.units)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """Every parameter by name."""
        return self.cost.parameters(self.config)

    def bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of every parameter where the weights have `dtype`."""
        width = dtype.itemsize
        return {name: math.prod(p.shape) * (4 if p.float32 else width) for name, p in self.parameters.items()}

    def tokens(self, clip: ClipShape) -> tuple[int, int]:
        """Noisy tokens and all tokens of a sample."""
        return self.cost.tokens(self.config, clip)

    def flops(self, clip: ClipShape, memory: Memory | None = None) -> float:
        """Floating point operations of one forward of one branch."""
        return self.cost.flops(self.config, clip, memory)
