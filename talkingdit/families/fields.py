# SPDX-License-Identifier: Apache-2.0
"""The fields of options as people meet them, on the command line and in a form: name, type, help, how text is read."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import os
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from talkingdit.families.flag import Flag

LONGEST_NAME = 255  # bytes, on the file systems that people have


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a dataclass.

    Args:
        name: of the field.
        kind: its type, without Annotated and None.
        flag: what its annotation says besides.
        default: None where it is required.
        required: there is no default.
        help: the string below it.
    """

    name: str
    kind: Any
    flag: Flag
    default: Any
    required: bool
    help: str

    @property
    def switch(self) -> bool:
        return self.kind is bool

    @property
    def choices(self) -> tuple[str, ...]:
        """What it may be, where that is a list of words."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def metavar(self) -> str:
        """What stands for the value in a help."""
        return self.flag.metavar or _metavar(self.kind)

    @property
    def reader(self) -> Callable[[str], Any]:
        """Makes a value of what was typed; its ValueError says what is wrong.

        Raises:
            TypeError: its type needs a `Flag` with `read`.
        """
        return self.flag.read or _reader(self.kind)


def fields(kind: type[Any]) -> list[Field]:
    """The fields of a dataclass, those that it inherits first."""
    hints, helps = get_type_hints(kind, include_extras=True), _docstrings(kind)
    found = []
    for one in dataclasses.fields(kind):
        type_, flag = _split(hints[one.name])
        required = one.default is dataclasses.MISSING
        found.append(
            Field(
                name=one.name,
                kind=type_,
                flag=flag,
                default=None if required else one.default,
                required=required,
                help=helps.get(one.name, ""),
            )
        )
    return found


def _split(hint: Any) -> tuple[Any, Flag]:
    """The type of a field without None, and what its annotation says of the flag."""
    flag = Flag()
    if get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        flag = next((item for item in more if isinstance(item, Flag)), flag)
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        hint = kinds[0] if len(kinds) == 1 else hint
    return hint, flag


def _reader(kind: Any) -> Callable[[str], Any]:
    """What makes a value of a type from a word; its ValueError says what is wrong."""
    if get_origin(kind) is Literal:
        return lambda text: _choice(text, get_args(kind))
    readers: dict[Any, Callable[[str], Any]] = {str: str, int: _integer, float: _number, Path: _path}
    if kind not in readers:
        raise TypeError(f"flags: a field of type {kind} needs a Flag with `read`")
    return readers[kind]


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    return {int: "N", float: "X", Path: "FILE"}.get(kind, "WORDS")


def _integer(text: str) -> int:
    with contextlib.suppress(ValueError):
        return int(text)
    raise ValueError(f"invalid integer value: {text!r}")


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        return float(text)
    raise ValueError(f"invalid number value: {text!r}")


def _path(text: str) -> Path:
    long = max((len(os.fsencode(part)) for part in Path(text).parts), default=0)
    if long > LONGEST_NAME:
        raise ValueError(f"must be a name of at most {LONGEST_NAME} bytes, got one of {long}")
    return Path(text).expanduser()


def _choice(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ValueError(f"invalid choice: {text!r} (choose from {', '.join(choices)})")
    return text


def _docstrings(kind: type[Any]) -> dict[str, str]:
    """The strings below the fields of a dataclass and of those it inherits from."""
    found: dict[str, str] = {}
    for home in reversed(kind.__mro__[:-1]):
        with contextlib.suppress(OSError, TypeError):  # made without a source: flags without help
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(home))).body
            found |= _strings_below(body)
    return found


def _strings_below(body: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for one, below in zip(body.body, body.body[1:], strict=False):
        match one, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found
