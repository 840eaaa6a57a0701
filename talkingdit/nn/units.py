# SPDX-License-Identifier: Apache-2.0
"""The structure of a model, written down once: which layers belong together.

Sharding gathers a unit at a time, offloading moves it, quantisation and Muon take the matrices of large ones, and plans
count by units. A family's units.py lists them in the order in which the forward calls them; everything that no pattern
fits is the root's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

# Tokens that go through the feed-forward layer of a block at once in inference; enough to fill a large GPU.
FFN_TOKENS = 8192


@dataclass(frozen=True)
class Unit:
    """Layers that are gathered, moved and counted together.

    Args:
        pattern: path of the module; "*" stands for a number.
        float32: they compute in float32, whatever the dtype of the rest.
        large: repeated layers that hold nearly all weights: quantised, cast, offloaded one by one.
    """

    pattern: str
    float32: bool = False
    large: bool = False

    def fits(self, path: str) -> bool:
        """Is this the path of a unit of the pattern?"""
        parts, wanted = path.split("."), self.pattern.split(".")
        return len(parts) == len(wanted) and all(
            part.isdigit() if want == "*" else part == want for part, want in zip(parts, wanted, strict=True)
        )


class Units(Protocol):
    """A family's units.py: the structure of its transformer."""

    UNITS: tuple[Unit, ...]  # in the order in which the forward calls them

    def walk(self, config: Mapping[str, Any]) -> list[str]:
        """Paths of the large units in the order in which the forward calls them."""


def unit_of(name: str, units: Sequence[Unit]) -> tuple[str, Unit | None]:
    """Path of the unit that a parameter or module belongs to, and the unit; "" and None for the root."""
    parts = name.split(".")
    for unit in units:
        path = ".".join(parts[: unit.pattern.count(".") + 1])
        if unit.fits(path):
            return path, unit
    return "", None


def modules_of(model: nn.Module, units: Sequence[Unit]) -> Iterator[tuple[str, Any, Unit]]:
    """The units of a model that exist in it: path, module and what is known of it, in the order of the list."""
    paths = dict(model.named_modules())
    for unit in units:
        for path, module in paths.items():
            if unit.fits(path):
                yield path, module, unit


def large_prefixes(units: Sequence[Unit]) -> tuple[str, ...]:
    """How names of parameters in large units begin: "blocks.", ..."""
    return tuple(unit.pattern.partition("*")[0] for unit in units if unit.large)
