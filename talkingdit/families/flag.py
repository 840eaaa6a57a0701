# SPDX-License-Identifier: Apache-2.0
"""How the fields of options are spelt on the command line. Options are plain dataclasses; most need nothing of this.

A field is a flag of its name, its docstring is the help, its default is shown. `bool` makes a switch; `int`, `float`,
`str`, `Path` and `Literal[...]`, with `| None` or without, take one value. Where that does not tell enough, a `Flag`
in the annotation does:

    size: Annotated[tuple[int, int] | None, SIDES] = None
    '''exact size of the video (default: by the portrait)'''
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from talkingdit.checkpoints.bounds import check_options
from talkingdit.pipelines.schedules import read_interval


@dataclass(frozen=True)
class Flag:
    """What the name and the type of a field do not say.

    Args:
        metavar: stands for the value in the help.
        read: makes the value of what was typed; its ValueError says what is wrong, "must be ..., got ...".
        write: the value as it would be typed, for the help.
        also: other spellings, "-o".
        many: the flag may be given again; the field is a tuple, and `read` makes one item of it.
    """

    metavar: str = ""
    read: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = str
    also: tuple[str, ...] = ()
    many: bool = False


def read_sides(text: str) -> tuple[int, int]:
    """Height and width from WIDTHxHEIGHT (or WIDTH*HEIGHT, as the official Wan program writes it).

    Raises:
        ValueError: something else.
    """
    width, _, height = text.lower().replace("*", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"must be WIDTHxHEIGHT in pixels, got {text!r}")
    return int(height), int(width)


def read_area(text: str) -> int:
    """Pixels, from a number or from WIDTHxHEIGHT.

    Raises:
        ValueError: something else.
    """
    if text.isdecimal() and int(text):
        return int(text)
    height, width = read_sides(text)
    return height * width


SIDES = Flag("WxH", read_sides, lambda sides: f"{sides[1]}x{sides[0]}")
AREA = Flag("N", read_area)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What may be said about a video of any family. A family's `Options` adds its own."""

    small: ClassVar[bool] = False  # models that are quick enough on the host: no GPU is taken where none is asked for

    seed: Annotated[int, Flag("N")] = 0
    """another number, another video"""
    steps: Annotated[int | None, Flag("N")] = None
    """denoising steps per clip (default: of the checkpoint)"""

    def __post_init__(self) -> None:
        check_options(self, "generate")
        if self.seed < 0:
            raise ValueError(f"generate: seed must be at least 0, got {self.seed}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"generate: steps must be at least 1, got {self.steps}")

    def voices(self) -> tuple[Path, ...]:
        """Recordings among the options that take the place of the one voice; they are heard together."""
        return ()

    def files(self) -> dict[str, Path]:
        """The files and folders among the options, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Path)}


INTERVAL = Flag("BEGIN-END")


def check_guidance_interval(words: str, verb: str = "generate") -> None:
    """Of the families that have one, and of their plans.

    Raises:
        ValueError: an interval that is none.
    """
    try:
        read_interval(words)
    except ValueError as error:
        raise ValueError(f"{verb}: guidance_interval {error}") from error


def check_step_cache(threshold: float) -> None:
    """Of the families that have one.

    Raises:
        ValueError: a threshold that is none.
    """
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"generate: step_cache must be a number of at least 0, got {threshold}")
