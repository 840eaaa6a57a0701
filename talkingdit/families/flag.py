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
from typing import Any


@dataclass(frozen=True)
class Flag:
    """What the name and the type of a field do not say.

    Args:
        metavar: stands for the value in the help.
        read: makes the value of what was typed; its ValueError says what is wrong, "must be ..., got ...".
        write: the value as it would be typed, for the help.
        also: other spellings, "-o".
    """

    metavar: str = ""
    read: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = str
    also: tuple[str, ...] = ()


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
