# SPDX-License-Identifier: Apache-2.0
"""A run as a list of stages: which parameters each trains, which begin at zero, and where in the list the run is.

Patterns are those of `fnmatch` (`*`, `?`, `[0-9]`) on the whole name of a parameter as the checkpoint spells it; a `*`
also stands for dots. The transformer's names may be given without their "transformer." in front.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from talkingdit.families import Family
from talkingdit.families.training import ANCHORS, GENERATE
from training.config import Config
from training.family import family_of
from training.sections import StageConfig

TRANSFORMER = "transformer."
# What wrappers (activation checkpointing, torch.compile, PEFT) put into the names of the parameters they wrap.
WRAPPED = re.compile(r"(_checkpoint_wrapped_module|_orig_mod|base_layer)\.")


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers put into it."""
    return WRAPPED.sub("", name)


def parameters(networks: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters under their plain names."""
    for name, parameter in networks.named_parameters():
        yield plain_name(name), parameter


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Does one of the patterns fit a plain name?"""
    short = name.removeprefix(TRANSFORMER)
    return any(fnmatchcase(name, pattern) or fnmatchcase(short, pattern) for pattern in patterns)


def chosen(names: Sequence[str], patterns: Sequence[str], where: str) -> set[str]:
    """The names that any pattern fits.

    Args:
        names: plain names.
        where: the key that the patterns come from, for messages.

    Raises:
        ValueError: a pattern fits none; names that are like it are listed.
    """
    found: set[str] = set()
    for pattern in patterns:
        fitting = {name for name in names if matches(name, [pattern])}
        if not fitting:
            near = ", ".join(_near(pattern, names)) or "none"
            raise ValueError(f"{where}: {pattern!r} matches no parameter; names like it: {near}")
        found |= fitting
    return found


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to five names like a pattern. Of layers that differ in their number only the first counts."""
    first: dict[str, str] = {}
    for name in names:
        short = name.removeprefix(TRANSFORMER)
        first.setdefault(re.sub(r"\d+", "0", short), short)
    bare = re.sub(r"[*?\[\]]+", "", re.sub(r"\d+", "0", pattern)).strip(".").removeprefix(TRANSFORMER)
    # A pattern often leaves out both ends, so it is also held against every part of a name.
    windows = {name: _windows(name, bare.count(".") + 1) for name in first}
    score = {
        name: max(difflib.SequenceMatcher(None, bare, part).ratio() for part in parts)
        for name, parts in windows.items()
    }
    best = sorted(score, key=lambda name: -score[name])[:5]
    return [first[name] for name in best if score[name] > 0.6]


def _windows(name: str, length: int) -> list[str]:
    """All runs of `length` parts of a dotted name, and the name."""
    parts = name.split(".")
    return [name, *(".".join(parts[i : i + length]) for i in range(max(1, len(parts) - length + 1)))]


@dataclass(frozen=True)
class Trained:
    """What a stage trains, by plain names."""

    train: tuple[str, ...]
    frozen: tuple[str, ...]
    weights: int  # elements of the trained parameters
    of: int  # elements of all

    def __str__(self) -> str:
        return (
            f"trains {self.weights / 1e6:,.1f} of {self.of / 1e6:,.1f} million weights "
            f"({len(self.train)} of {len(self.train) + len(self.frozen)} tensors)"
        )


def select_parameters(networks: nn.Module, stage: StageConfig) -> Trained:
    """Set `requires_grad` of every parameter: what `train` fits and `freeze` does not. Sharded networks may be given.

    Raises:
        ValueError: a pattern fits nothing, or nothing is left to train.
    """
    all_of = dict(parameters(networks))
    names = list(all_of)
    train = chosen(names, stage.train, f"stages.{stage.name}.train")
    train -= chosen(names, stage.freeze, f"stages.{stage.name}.freeze")
    if not train:
        raise ValueError(f"stages.{stage.name}: freeze takes away everything that train names; nothing would train")
    for name, parameter in all_of.items():
        parameter.requires_grad_(name in train)
    return Trained(
        train=tuple(name for name in names if name in train),
        frozen=tuple(name for name in names if name not in train),
        weights=sum(all_of[name].numel() for name in train),
        of=sum(parameter.numel() for parameter in all_of.values()),
    )


def _zero_names(names: Sequence[str], train: Collection[str], stage: StageConfig) -> set[str]:
    where = f"stages.{stage.name}.zero"
    zero = chosen(names, stage.zero, where)
    for name in sorted(zero.difference(train)):
        raise ValueError(f"{where}: {name} would stay zero, it does not train in this stage")
    return zero


@torch.no_grad()
def zero_parameters(networks: nn.Module, stage: StageConfig) -> list[str]:
    """Set to zero what `zero` of a stage names, and return the plain names. Sharded networks may be given.

    Zeros in the last layer of a branch, or in its values, let the network begin as it was without that branch. Call it
    after `select_parameters`, where `Progress.enter` says that the stage begins, never after a resume.

    Raises:
        ValueError: a pattern fits nothing, or what it fits does not train in the stage and so would stay zero.
    """
    all_of = dict(parameters(networks))
    zero = _zero_names(list(all_of), {name for name, parameter in all_of.items() if parameter.requires_grad}, stage)
    for name in zero:
        all_of[name].zero_()
    return [name for name in all_of if name in zero]


def check_supported(stage: StageConfig, family: Family) -> None:
    """Refuse conditions that the models of a family do not take.

    Raises:
        ValueError: the stage gives anchors, or asks for another task than the whole clip, and they do not.
    """
    where, extras = f"stages.{stage.name}.conditions", family.train.EXTRAS
    if stage.conditions.anchors.types and ANCHORS not in extras:
        raise ValueError(f"{where}.anchors: models of {family.title} take no anchors")
    for task in stage.conditions.tasks:
        if task not in (GENERATE, *extras):
            raise ValueError(f"{where}.tasks: models of {family.title} do not have the task {task!r}")


def check_stages(config: Config, networks: nn.Module) -> list[Trained]:
    """Whether every stage can be trained and its patterns fit the networks (which may be on meta), before a long run.

    Leaves `requires_grad` as the first stage has it.

    Raises:
        ValueError: see `check_supported`, `select_parameters` and `zero_parameters`; or a pattern of `optim.lr_scale`
            fits nothing.
    """
    report, family = [], family_of(config)
    for stage in config.stages:
        check_supported(stage, family)
        trained = select_parameters(networks, stage)
        names = [*trained.train, *trained.frozen]
        _zero_names(names, trained.train, stage)
        chosen(names, list(stage.optim.lr_scale), f"stages.{stage.name}.optim.lr_scale")
        report.append(trained)
    select_parameters(networks, config.stages[0])
    return report


class Progress:
    """Where a run is: its stage, the step in it, and the time spent in it. It is part of every checkpoint.

    Args:
        stages: of the configuration.

    Attributes:
        index: of the stage, `len(stages)` at the end of the run.
        step: finished steps of the stage, at the end of the run those of the last one.
        total: finished steps of the run.
        elapsed: seconds of training spent in the stage.
        entered: name of the last stage that has begun.
    """

    def __init__(self, stages: Sequence[StageConfig]) -> None:
        self.stages = tuple(stages)
        self.index = self.step = self.total = 0
        self.elapsed = 0.0
        self.entered = ""

    @property
    def done(self) -> bool:
        return self.index >= len(self.stages)

    @property
    def stage(self) -> StageConfig:
        """The current stage; the last one after the end."""
        return self.stages[min(self.index, len(self.stages) - 1)]

    @property
    def fraction(self) -> float:
        """How much of the stage is done, 0..1: of its minutes if it has some, of its steps otherwise."""
        if self.done:
            return 1.0
        if self.stage.minutes > 0:
            return min(1.0, self.elapsed / (60 * self.stage.minutes))
        return min(1.0, self.step / self.stage.steps)

    @property
    def overall(self) -> float:
        """How much of the run is done, 0..1, every stage by its length if all have steps, else all alike."""
        if self.done:
            return 1.0
        timed = any(stage.minutes > 0 for stage in self.stages)
        lengths = [1 if timed else stage.steps for stage in self.stages]
        return (sum(lengths[: self.index]) + self.fraction * lengths[self.index]) / sum(lengths)

    def enter(self) -> bool:
        """Note that the current stage is being trained; True if it begins now, False if the run resumes in it."""
        begins = self.entered != self.stage.name
        self.entered = self.stage.name
        return begins

    def advance(self, seconds: float = 0.0, steps: int = 1) -> bool:
        """Count steps and their time; True if that ended the stage, and the next one is then the current one."""
        self.step += steps
        self.total += steps
        self.elapsed += seconds
        if self.fraction < 1:
            return False
        self.index += 1
        if not self.done:
            self.step, self.elapsed = 0, 0.0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage": "" if self.done else self.stage.name,
            "step": self.step,
            "total": self.total,
            "elapsed": self.elapsed,
            "entered": self.entered,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. The stage is found by its name, so stages may be added, or made longer or shorter.

        Raises:
            ValueError: the configuration has no stage of that name.
        """
        names = [stage.name for stage in self.stages]
        name = state["stage"]
        if name and name not in names:
            raise ValueError(
                f"the checkpoint is in stage {name!r}, which the configuration does not have; stages: "
                f"{', '.join(names)}"
            )
        last = state["entered"]
        if name:
            self.index = names.index(name)
        elif last in names:  # the run had ended; its last stage may be longer now, or others were added behind it
            self.index = names.index(last) + (int(state["step"]) == 0)
        else:
            self.index = len(names)
        self.step, self.total, self.elapsed = int(state["step"]), int(state["total"]), float(state["elapsed"])
        self.entered = last
        if not self.done and self.step and self.fraction >= 1:  # it had ended, or was made shorter than it already was
            self.advance(steps=0)


def averaged_names(config: Config, trained: set[str]) -> set[str]:
    """Plain names of the parameters whose averages are kept: none where no stage asks for averages (`optim.ema` 0)."""
    return trained if any(stage.optim.ema > 0 for stage in config.stages) else set()


def trained_names(config: Config, networks: nn.Module) -> set[str]:
    """Plain names of all parameters that train in any stage; raises as `check_stages`."""
    return {name for stage in check_stages(config, networks) for name in stage.train}
