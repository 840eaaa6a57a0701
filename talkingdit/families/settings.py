# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint is used: pipeline.json in its folder, which a family reads into a dataclass of its own."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from talkingdit.atomic import write_whole
from talkingdit.errors import UserError

Settings = TypeVar("Settings", bound="PipelineSettings")


@dataclass(frozen=True)
class PipelineSettings:
    """What the settings of all families have in common.

    Attributes:
        COUNTS: names of integers of at least 1.
        NUMBERS: names of numbers of at least 0; `shift`, of the noise schedule, must be above it.
        TEXTS: names of strings.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ()
    NUMBERS: ClassVar[tuple[str, ...]] = ()
    TEXTS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in self.COUNTS:
            self.check_count(name, 1)
        for name in self.NUMBERS:
            self.check_number(name)
        for name in self.TEXTS:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"pipeline.json: {name} must be a string, got {getattr(self, name)!r}")
        if getattr(self, "shift", None) == 0:
            raise ValueError("pipeline.json: shift must be a number above 0, got 0")

    def check_count(self, name: str, least: int) -> None:
        """Raises ValueError where it is no integer of at least so many."""
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"pipeline.json: {name} must be an integer of at least {least}, got {value!r}")

    def check_number(self, name: str) -> None:
        """Raises ValueError where it is no number of at least 0."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"pipeline.json: {name} must be a number of at least 0, got {value!r}")

    def check_word(self, name: str, words: tuple[str, ...]) -> None:
        """Raises ValueError where it is none of these words."""
        value: Any = getattr(self, name)
        if value not in words:
            raise ValueError(f"pipeline.json: {name} must be one of {', '.join(words)}, got {value!r}")

    def check_switch(self, name: str) -> None:
        """Raises ValueError where it is neither true nor false."""
        if not isinstance(getattr(self, name), bool):
            raise ValueError(f"pipeline.json: {name} must be true or false, got {getattr(self, name)!r}")

    @classmethod
    def load(cls: type[Settings], path: Path) -> Settings:
        """Read pipeline.json; a missing entry has its default, an unknown one is an error.

        Raises:
            UserError: not such a file, or an impossible value.
        """
        from talkingdit.checkpoints.weights import read_bounded

        values = read_bounded(path)
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"{path}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        try:
            return cls(**values)
        except ValueError as error:
            raise UserError(f"{path.parent}: {error}.") from error

    def save(self, path: Path) -> None:
        """Write pipeline.json, whole or not at all."""
        write_whole(path, (json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n").encode())
