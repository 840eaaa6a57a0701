# SPDX-License-Identifier: Apache-2.0
"""The parameters of a transformer by the units in which training gathers them, from the architecture alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from talkingdit.nn.units import unit_of
from talkingdit.plan.run import TrainingRun

if TYPE_CHECKING:
    from talkingdit.plan.transformer import Transformer


@dataclass
class UnitSize:
    """Parameters that are gathered together.

    Attributes:
        float32: they compute in float32.
        stays: they stay gathered between forward and backward.
        reached: a backward goes through them, because they or what lies before them train.
        fetched: they are gathered for the backward, because it goes through them or what comes next.
        shapes: of the parameters, and whether they train.
        matrices: elements of each of those that Muon works on.
        eight: rows and columns of matrices that are stored in eight bits, on every rank, and not gathered.
        swapped: these wait on the host.
    """

    float32: bool = False
    stays: bool = False
    reached: bool = True
    fetched: bool = True
    shapes: list[tuple[tuple[int, ...], bool]] = field(default_factory=list)
    matrices: list[int] = field(default_factory=list)
    eight: list[tuple[int, int]] = field(default_factory=list)
    swapped: bool = False

    def stored(self, ranks: int, frozen: str) -> float:
        """Bytes of the shards of weights that a rank holds between steps; `frozen` as `TrainingRun` has it."""
        trained = self.elements(ranks, trained=True)
        wide = self.float32 or frozen == "float32"
        return (4 * trained + (4 if wide else 2) * (self.elements(ranks) - trained)) / ranks

    @property
    def eight_bytes(self) -> float:
        """Of the matrices in eight bits, with a float32 scale a row."""
        return float(sum(rows * (columns + 4) for rows, columns in self.eight))

    def elements(self, ranks: int = 1, trained: bool = False) -> int:
        """Elements, with what pads the first axis to a multiple of the ranks; `trained`: only of those that train."""
        return sum(
            -(-shape[0] // ranks) * ranks * math.prod(shape[1:])
            for shape, trains in self.shapes
            if trains or not trained
        )


@dataclass(frozen=True)
class UnitSizes:
    """A transformer's parameters by path of their unit; "" is the root.

    Args:
        units: by path.
        walk: paths of the large units in the forward's order.
    """

    units: dict[str, UnitSize]
    walk: tuple[str, ...]

    @property
    def back(self) -> list[str]:
        """What of the walk a backward goes through, in the order of the forward."""
        return [name for name in self.walk if self.units[name].reached]

    @property
    def last(self) -> list[str]:
        """Units behind the walk, where a backward begins."""
        return [name for name, unit in self.units.items() if name and unit.stays]

    def total(self, ranks: int = 1, trained: bool = False) -> int:
        return sum(unit.elements(ranks, trained) for unit in self.units.values())

    @property
    def matrices(self) -> int:
        """Elements that Muon works on."""
        return sum(sum(unit.matrices) for unit in self.units.values())

    def eight_bytes(self, swapped: bool) -> float:
        """Bytes of the matrices in eight bits that wait on the host, or that do not."""
        return sum(unit.eight_bytes for unit in self.units.values() if unit.swapped == swapped)

    @property
    def largest_eight(self) -> int:
        """Elements of the largest matrix that is stored in eight bits."""
        return max((rows * columns for unit in self.units.values() for rows, columns in unit.eight), default=0)

    @property
    def widest(self) -> tuple[int, int]:
        """Of the layers of large units that are not stored in eight bits: most inputs, and most elements."""
        shapes = [shape for path in self.walk for shape, _ in self.units[path].shapes if len(shape) == 2]
        return max((shape[1] for shape in shapes), default=0), max(map(math.prod, shapes), default=0)

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest matrix that Muon works on."""
        return max((size for unit in self.units.values() for size in unit.matrices), default=0)


def unit_sizes(transformer: Transformer, run: TrainingRun) -> UnitSizes:
    """The units of a transformer with what the run trains. Nothing is loaded.

    Raises:
        ValueError: the run trains what the family does not know.
    """
    cost, listed = transformer.cost, transformer.units.UNITS
    allowed = ("all", "lora", *cost.SUBSETS)
    if run.trains not in allowed:
        raise ValueError(f"plan: trains must be one of {', '.join(allowed)}, got {run.trains!r}")
    adapted = tuple(f"{target}.weight" for target in cost.LORA_TARGETS) if run.trains == "lora" else ()
    units = {"": UnitSize(stays=True)}
    for name, parameter in transformer.parameters.items():
        path, kind = unit_of(name, listed)
        unit = units.setdefault(path, UnitSize(kind is not None and kind.float32))
        trains = run.trains == "all" or name.startswith(cost.SUBSETS.get(run.trains, ()))
        shape = parameter.shape
        if run.eight_bits and not trains and kind is not None and kind.large and len(shape) == 2:
            unit.eight.append((shape[0], shape[1]))
        else:
            unit.shapes.append((shape, trains))
        if trains and kind is not None and kind.large and len(shape) == 2:
            unit.matrices.append(math.prod(shape))
        if adapted and name.endswith(adapted):
            unit.shapes += [((run.lora_rank, shape[1]), True), ((shape[0], run.lora_rank), True)]
    sizes = UnitSizes(units, tuple(transformer.units.walk(transformer.config)))
    for path in sizes.walk[: run.swap]:
        units[path].swapped = True
    _follow_the_backward(transformer, sizes, run)
    return sizes


def _follow_the_backward(transformer: Transformer, sizes: UnitSizes, run: TrainingRun) -> None:
    """Mark which units a backward goes through, and which it gathers again."""
    listed, units = transformer.units.UNITS, sizes.units
    before: list[str] = []
    behind = False
    for kind in listed:
        behind |= kind.large
        for path in units if not kind.large else ():
            if kind.fits(path):
                units[path].stays = behind
                if not behind:
                    before.append(path)
    order = [*before, *sizes.walk]
    reached = False
    for path in order:
        trains = units[path].elements(trained=True) > 0
        reached |= trains and path in sizes.walk
        units[path].reached = trains or reached or run.trains == "all"
    for path, following in pairwise(order):
        units[path].fetched = units[following].reached
