# SPDX-License-Identifier: Apache-2.0
"""What `accelerate` did to a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """What was replaced in a model and what was left alone.

    Attributes:
        model: name of the model's class.
        replaced: number of replacements of each kind.
        left: number of modules of each (kind, reason) that were left as they are.
        already: number of modules that an earlier call had replaced.
    """

    model: str
    replaced: Counter[str] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    already: int = 0

    def __str__(self) -> str:
        lines = [self.model]
        lines += [f"  replaced: {count} x {kind}" for kind, count in self.replaced.items()]
        if self.already:
            lines.append(f"  already replaced by an earlier call: {self.already}")
        if not self.replaced:
            lines.append("  nothing was changed")
        lines += [f"  left alone: {count} x {kind}: {reason}" for (kind, reason), count in self.left.items()]
        return "\n".join(lines)
