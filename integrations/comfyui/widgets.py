# SPDX-License-Identifier: Apache-2.0
"""The options of a family as inputs of a node. Names, defaults and help are those of the family's dataclass.

A widget has no "none": where the checkpoint decides, a number is -1, a choice is "default", and words are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from talkingdit.errors import UserError
from talkingdit.families import Family, GenerationOptions
from talkingdit.families.fields import Field, fields

from . import host

UNSET = -1  # of a number that the checkpoint decides
DEFAULT = "default"  # of a choice likewise
LOADING = ("memory", "compile")  # change a model while it is loaded: inputs of the loader
DUBBING = ("video", "mask")  # inputs of the dub node
LARGEST = 1 << 24


def common() -> list[Field]:
    """What may be said about a video of any family: widgets of the nodes that generate."""
    return fields(GenerationOptions)


@lru_cache(maxsize=64)
def own(family: Family) -> tuple[Field, ...]:
    """Fields of a family that its node of options has. What may be given again comes along wires from nodes of its
    own: speakers, anchors, emotions."""
    aside = {*LOADING, *DUBBING, *(one.name for one in common())}
    return tuple(one for one in fields(family.options) if one.name not in aside and not one.flag.many)


def is_video(field: Field) -> bool:
    """Is it a file that comes as a VIDEO?"""
    return field.kind is Path and field.metavar == "MP4"


def widget(field: Field) -> tuple[Any, dict[str, Any]]:
    """A field as ComfyUI wants it: a type, or a list of choices, and what is said about it."""
    unset = field.default is None
    about: dict[str, Any] = {"tooltip": field.help}
    if field.switch:
        return "BOOLEAN", {**about, "default": bool(field.default)}
    if field.choices:
        choices = [DEFAULT] * unset + list(field.choices)
        return choices, {**about, "default": DEFAULT if unset else field.default}
    if field.kind in (int, float) and field.flag.read is None:
        number = UNSET if unset else field.default
        limits = {"default": number, "min": UNSET if unset else 0, "max": LARGEST}
        if unset:
            about["tooltip"] += f"; {UNSET}: as it is by default"
        if field.kind is float:
            return "FLOAT", {**about, **limits, "step": 0.01, "round": False}
        return "INT", {**about, **limits}
    words = "" if unset else field.flag.write(field.default)
    return "STRING", {**about, "default": words, "placeholder": field.metavar}


def values(family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was said in the widgets of a family's node, without what is as it is by default.

    Raises:
        UserError: a file that is not there, or a place that nothing is written to.
    """
    return {
        one.name: _value(family, one, given[one.name])
        for one in own(family)
        if one.name in given and not is_video(one) and not is_default(one, given[one.name])
    }


def is_default(field: Field, value: Any) -> bool:
    """Does a widget say nothing?"""
    if field.default is None:
        return value in (UNSET, DEFAULT, "", None)
    if field.flag.read is None:
        return bool(value == field.default)
    return value in ("", field.flag.write(field.default))  # words that were taken out say nothing either


def _value(family: Family, field: Field, value: Any) -> Any:
    if field.kind is not Path:
        return value
    return file_named(value, field.name) if _is_read(family, field) else _target(value, field.name)


def file_named(words: str, name: str) -> Path:
    """A file by its name in ComfyUI's folder of inputs, or by its path.

    Raises:
        UserError: there is none.
    """
    folder = host.input_folder()
    for path in (folder / words, Path(words).expanduser()):
        if path.is_absolute() and path.exists():
            return path
    raise UserError(f"{name}: expected a file in {folder}, or the path of one, got {words!r}.")


def _target(words: str, name: str) -> Path:
    """A file to write, in ComfyUI's folder of outputs."""
    folder = host.output_folder().resolve()
    path = (folder / words).resolve()
    if folder not in path.parents:
        raise UserError(f"{name}: expected the name of a file to write in {folder}, got {words!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _is_read(family: Family, field: Field) -> bool:
    """Is it a file that is there already? One that will be written is not among those that options name."""
    probe = Path(f"probe.{field.metavar.lower()}")
    return probe in family.options(**{field.name: probe}).files().values()
