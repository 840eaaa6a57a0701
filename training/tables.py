# SPDX-License-Identifier: Apache-2.0
"""Fills dataclasses from tables of plain values (TOML, JSON) by their type hints, with errors that name the key."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union


def fill(target: Any, values: Mapping[str, Any], where: str = "") -> None:
    """Set the fields of a dataclass instance from a table; keys left out keep their values.

    A table for a field that is a dataclass is filled in the same way; dictionaries and lists are replaced as a whole.
    Unknown keys go to the field that a class variable `REST` names, if the dataclass has one.

    Args:
        target: instance of a dataclass, changed in place.
        values: the table.
        where: path of the table for messages, "" or ending with a dot.

    Raises:
        ValueError: a key that the dataclass does not have, or a value of the wrong type.
    """
    hints = typing.get_type_hints(type(target))
    known = {f.name for f in fields(target) if f.init}
    rest = {key: value for key, value in values.items() if key not in known}
    if rest and hasattr(target, "REST"):
        setattr(target, target.REST, {**getattr(target, target.REST), **rest})
    elif rest:
        key = next(iter(rest))
        raise ValueError(f"unknown key {where}{key}; known here: {', '.join(sorted(known))}")
    for key, value in values.items():
        if key in rest:
            continue
        current = getattr(target, key)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}{key} must be a table, got {value!r}")
            fill(current, value, f"{where}{key}.")
        else:
            setattr(target, key, convert(value, hints[key], f"{where}{key}"))


def convert(value: Any, hint: Any, where: str) -> Any:
    """A plain value as the type that a hint asks for.

    Knows bool, int, float (from whole numbers too), str, Path, Literal, Any, unions, lists, tuples, dictionaries with
    text as keys, and dataclasses.

    Raises:
        ValueError: the value is of another type; the message begins with `where`.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return convert(value, arguments[0], where)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return convert(value, option, where)
            except ValueError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif is_dataclass(hint):
        if isinstance(value, Mapping):
            made: Any = hint()  # type: ignore[operator]
            fill(made, value, f"{where}.")
            return made
    elif origin is dict:
        if isinstance(value, Mapping):
            return {key: convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    elif origin is list:
        if isinstance(value, list | tuple):
            return [convert(item, arguments[0], f"{where}.{i}") for i, item in enumerate(value)]
    elif origin is tuple:
        if isinstance(value, list | tuple) and len(value) == len(arguments):
            pairs = zip(value, arguments, strict=True)
            return tuple(convert(item, kind, f"{where}.{i}") for i, (item, kind) in enumerate(pairs))
    elif hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is type(None):
        if value is None:
            return None
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where} must be {_spelled(hint)}, got {value!r}")


def _spelled(hint: Any) -> str:
    """A type as a reader of a TOML file would say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _spelled(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_spelled(option) for option in arguments if option is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in arguments)
    if origin is tuple:
        return f"[{', '.join(_spelled(argument) for argument in arguments)}]"
    if origin is list:
        return f"a list of {_spelled(arguments[0])}"
    if origin is dict or is_dataclass(hint):
        return "a table"
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false", Path: "a path"}
    return names.get(hint, str(hint))


def changes(before: Any, after: Any) -> dict[str, Any]:
    """What differs between two instances of a dataclass, as a table that `fill` would take."""
    table: dict[str, Any] = {}
    for f in fields(before):
        old, new = getattr(before, f.name), getattr(after, f.name)
        if is_dataclass(old):
            inner = changes(old, new)
            if inner:
                table[f.name] = inner
        elif old != new:
            table[f.name] = new
    return table
