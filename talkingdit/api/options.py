# SPDX-License-Identifier: Apache-2.0
"""Options of a family from keyword arguments: the fields of its dataclass, with what a program holds in them."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from talkingdit import families
from talkingdit.api.materials import Materials
from talkingdit.errors import UserError
from talkingdit.families import Family, GenerationOptions
from talkingdit.families.flag import Flag

# What pipelines of diffusers call some options, where no letters tell it.
DIFFUSERS = {"generator": "seed", "num_inference_steps": "steps", "height": "size", "width": "size"}


def chosen(family: Family, given: Mapping[str, Any], materials: Materials) -> GenerationOptions:
    """The options of a family.

    Args:
        family: of the checkpoint.
        given: by the names of the fields of its `Options`, "seed", "steps", ... A value is what the field holds, or the
            words of the command line for it. Where a field holds a file, a picture or a sound may stand for it. A field
            that may be given again takes a list, whose items may be words, dictionaries of their fields, or finished,
            or a dictionary of names and files: `anchors={"view/front": picture}`. It may be called in the plural.
        materials: makes files of what a program holds.

    Raises:
        UserError: the family has no such option, or a value is not good.
    """
    hints = get_type_hints(family.options, include_extras=True)
    fields = {field.name for field in dataclasses.fields(family.options)}
    values: dict[str, Any] = {}
    for said, value in given.items():
        name = said
        if said not in fields and said.endswith("s") and said[:-1] in fields and _flag_of(hints[said[:-1]]).many:
            name = said[:-1]
        if name not in fields:
            raise UserError(_unknown(family, said, fields))
        if name in values:
            raise UserError(f"generate: {name} was given twice, as {name} and as {name}s.")
        try:
            values[name] = _value(hints[name], value, name, materials)
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"generate: {name} {str(error).removesuffix('.')}.") from error
    try:
        return family.options(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{str(error).removesuffix('.')}.") from error


def _unknown(family: Family, name: str, fields: Iterable[str]) -> str:
    """The sentence about an option that a family does not have."""
    words = set(name.split("_"))
    if name in DIFFUSERS and (meant := DIFFUSERS[name]) in fields:
        return f"generate: {family.title} has no option {name!r}; here it is {meant}."
    near = difflib.get_close_matches(name, fields, n=3) or sorted(f for f in fields if words & set(f.split("_")))
    if near:
        return f"generate: {family.title} has no option {name!r}; near ones are {', '.join(near)}."
    owners = [other.title for other in map(families.get, families.names()) if _has(other, name)]
    if owners:
        return f"generate: {family.title} has no option {name!r}, only {', '.join(owners)}."
    return f"generate: {family.title} has no option {name!r}; there are {', '.join(sorted(fields))}."


def _has(family: Family, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(family.options))


def _flag_of(hint: Any) -> Flag:
    return next((item for item in get_args(hint)[1:] if isinstance(item, Flag)), Flag())


def _kind_of(hint: Any) -> Any:
    """The type of a field without what its annotation says and without None."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        hint = kinds[0] if len(kinds) == 1 else hint
    return hint


def _value(hint: Any, value: Any, name: str, materials: Materials) -> Any:
    flag, kind = _flag_of(hint), _kind_of(hint)
    if value is None:
        return () if flag.many else None
    if flag.many:
        return _many(flag, get_args(kind)[0], value, name, materials)
    if kind is Path:
        return materials.file(value, name)
    if isinstance(value, os.PathLike) and kind is str:
        return os.fspath(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a strength that may also be a schedule
    if isinstance(value, str) and flag.read is not None and kind is not str:
        return flag.read(value)
    return _plain(kind, value)


def _plain(kind: Any, value: Any) -> Any:
    """A value of a plain kind; others are checked by the dataclass itself."""
    is_bool = isinstance(value, bool | np.bool_)
    if kind is bool and not is_bool:
        raise ValueError(f"must be True or False, got {value!r}")
    if kind is int and (is_bool or not isinstance(value, numbers.Integral)):
        raise ValueError(f"must be a whole number, got {value!r}")
    if kind is float and (is_bool or not isinstance(value, numbers.Real)):
        raise ValueError(f"must be a number, got {value!r}")
    if kind is str and not isinstance(value, str):
        raise ValueError(f"must be words, got {value!r}")
    return kind(value) if kind in (bool, int, float) else value


def _many(flag: Flag, kind: Any, value: Any, name: str, materials: Materials) -> tuple[Any, ...]:
    """The items of a field that may be given again."""
    assert flag.read is not None
    if isinstance(value, Mapping) and not _fields_of(kind, value):
        return tuple(flag.read(f"{key}={materials.file(item, f'{name} {key}')}") for key, item in value.items())
    items = value if isinstance(value, list | tuple) else (value,)
    return tuple(_item(flag, kind, item, f"{name} {number}", materials) for number, item in enumerate(items, 1))


def _fields_of(kind: Any, value: Mapping[str, Any]) -> bool:
    """Are the keys fields of an item?"""
    return dataclasses.is_dataclass(kind) and set(value) <= {field.name for field in dataclasses.fields(kind)}


def _item(flag: Flag, kind: Any, item: Any, name: str, materials: Materials) -> Any:
    assert flag.read is not None
    if isinstance(item, kind):
        return item
    if isinstance(item, Mapping):
        hints = get_type_hints(kind)
        if not _fields_of(kind, item):
            raise ValueError(f"must have the fields {', '.join(hints)}, got {', '.join(map(str, item))}")
        return kind(**{key: _part(hints[key], part, f"{name} {key}", materials) for key, part in item.items()})
    if isinstance(item, str | os.PathLike):
        return flag.read(os.fspath(item))
    return flag.read(str(materials.file(item, name)))


def _part(hint: Any, value: Any, name: str, materials: Materials) -> Any:
    """A field of an item."""
    return materials.file(value, name) if _kind_of(hint) is Path and value is not None else value
