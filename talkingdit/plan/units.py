# SPDX-License-Identifier: Apache-2.0
"""The parameters of a Wan-S2V transformer by the units in which training gathers them, from the architecture alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from talkingdit.plan.training import Run

LORA_TARGETS = (".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")

# Layers that are gathered on their own (training/parallel.py), in the order in which the forward calls them, and
# whether they are float32. "*" is a number; everything else is the root's and stays gathered.
_UNITS = {
    "text_embedding": False,
    "casual_audio_encoder": True,
    "audio_injector.injector_adain_layers.*": False,
    "time_embedding": True,
    "time_projection": True,
    "blocks.*": False,
    "audio_injector.injector.*": False,
    "head": True,
}


@dataclass
class Unit:
    """Parameters that are gathered together.

    Attributes:
        float32: they compute in float32.
        reached: a backward goes through them, because they or what lies before them train.
        fetched: they are gathered for the backward, because it goes through them or what comes next.
        shapes: of the parameters, and whether they train.
        matrices: elements of those that Muon works on.
    """

    float32: bool
    reached: bool = True
    fetched: bool = True
    shapes: list[tuple[tuple[int, ...], bool]] = field(default_factory=list)
    matrices: int = 0

    def elements(self, ranks: int = 1, trained: bool = False) -> int:
        """Elements, with what pads the first axis to a multiple of the ranks; `trained`: only of those that train."""
        return sum(
            -(-shape[0] // ranks) * ranks * math.prod(shape[1:])
            for shape, trains in self.shapes
            if trains or not trained
        )


@dataclass(frozen=True)
class Model:
    """A transformer's parameters, by unit; "" is the root. `walk`: blocks and injections in the forward's order."""

    units: dict[str, Unit]
    walk: tuple[str, ...]

    @property
    def back(self) -> list[str]:
        """What of the walk a backward goes through, in the order of the forward."""
        return [name for name in self.walk if self.units[name].reached]

    def total(self, ranks: int = 1, trained: bool = False) -> int:
        return sum(unit.elements(ranks, trained) for unit in self.units.values())

    @property
    def matrices(self) -> int:
        return sum(unit.matrices for unit in self.units.values())


def model_of(config: Mapping[str, Any], run: Run) -> Model:
    """The units of a transformer with what the run trains, from the architecture. Nothing is loaded."""
    import torch

    from talkingdit.families.wan_s2v.model import WanS2VModel

    with torch.device("meta"):
        transformer = WanS2VModel(**config)
    units: dict[str, Unit] = {"": Unit(False)}
    for name, parameter in transformer.named_parameters():
        key = _unit(name)
        unit = units.setdefault(key, Unit(_UNITS.get(_pattern(key), False)))
        audio = name.startswith(("casual_audio_encoder.", "audio_injector."))
        trains = run.trains == "all" or (run.trains == "audio" and audio)
        shape = tuple(parameter.shape)
        unit.shapes.append((shape, trains))
        inner = name.startswith(("blocks.", "audio_injector.injector."))
        if trains and inner and len(shape) == 2:
            unit.matrices += math.prod(shape)
        if run.trains == "lora" and name.endswith(tuple(f"{target}.weight" for target in LORA_TARGETS)):
            unit.shapes += [((run.lora_rank, shape[1]), True), ((shape[0], run.lora_rank), True)]
    index = list(config["audio_inject_layers"])
    walk = []
    for i in range(config["num_layers"]):
        walk.append(f"blocks.{i}")
        if i in index:
            walk.append(f"audio_injector.injector.{index.index(i)}")
    first = [name for pattern in _UNITS for name in units if _pattern(name) == pattern and name not in walk]
    order = [*first[:-1], *walk]  # without the head
    reached = False
    for name in order:
        trains = units[name].elements(trained=True) > 0
        reached |= trains and name in walk
        units[name].reached = trains or reached or run.trains == "all"
    for name, following in pairwise(order):
        units[name].fetched = units[following].reached
    return Model(units, tuple(walk))


def _pattern(unit: str) -> str:
    """The name of a unit as _UNITS has it."""
    return ".".join("*" if part.isdigit() else part for part in unit.split("."))


def _unit(name: str) -> str:
    """The unit that a parameter belongs to; "" for the root."""
    parts = name.split(".")
    for pattern in _UNITS:
        wanted = pattern.split(".")
        if len(parts) > len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=False)):
            return ".".join(parts[: len(wanted)])
    return ""
