# SPDX-License-Identifier: Apache-2.0
"""The families of models, by name. Nothing of a family is loaded before it is asked for.

A package of its own may add a family: with `register`, or by an entry point of the group `talkingdit.families` that
names a module with a `FAMILY`.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from talkingdit.checkpoints.bounds import check_plain
from talkingdit.errors import UserError
from talkingdit.families.family import Family
from talkingdit.families.flag import GenerationOptions

__all__ = ["Family", "GenerationOptions", "get", "names", "of_folder", "of_preset", "preset", "presets", "register"]

DEFAULT = "puppet"  # the family of the model that ships with the package
_MODULES = {
    "puppet": "talkingdit.families.puppet",
    "wan_s2v": "talkingdit.families.wan_s2v",
    "wan_i2v": "talkingdit.families.wan_i2v",
    "hunyuan_avatar": "talkingdit.families.hunyuan_avatar",
    "skyreels_audio": "talkingdit.families.skyreels_audio",
    "gloria": "talkingdit.families.gloria",
}


def register(name: str, module: str) -> None:
    """Add a family: `module` has a `FAMILY` of this name."""
    _MODULES[name] = module


@lru_cache(maxsize=1)
def _installed() -> dict[str, str]:
    return {entry.name: entry.value for entry in entry_points(group="talkingdit.families")}


def names() -> list[str]:
    """Names of all families."""
    return [*_MODULES, *(name for name in _installed() if name not in _MODULES)]


def get(name: str) -> Family:
    """A family by its name.

    Raises:
        UserError: there is none of this name.
    """
    module = _MODULES.get(name) or _installed().get(name)
    if module is None:
        raise UserError(f"family: expected one of {', '.join(names())}, got {name!r}.")
    return importlib.import_module(module).FAMILY


def of_folder(folder: str | Path) -> Family:
    """The family that a checkpoint folder belongs to.

    Those that were added last are asked first, and before all a family that shares files of another: it knows its
    folders by more than the transformer in them.

    Raises:
        UserError: no such folder, or one of no family.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        raise UserError(f"{root}: the checkpoint must be a folder, and there is none of this name.")
    check_plain(root)
    for family in sorted(map(get, reversed(names())), key=lambda family: not family.base):
        if family.checkpoint.owns(root):
            return family
    known = ", ".join(get(name).title for name in names())
    raise UserError(f"{root}: expected the checkpoint of one of {known}, got a folder with none of their files.")


def of_preset(name: str) -> Family:
    """The family that has a preset.

    Raises:
        UserError: none has it.
    """
    for family in map(get, names()):
        if name in family.presets:
            return family
    raise UserError(f"{name}: neither a folder nor a preset ({', '.join(sorted(presets()))}).")


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """Arguments of a preset's transformer, with changes: `preset("puppet_tiny", num_layers=6)`.

    Raises:
        ValueError: there is no preset of this name.
    """
    known = presets()
    if name not in known:
        raise ValueError(f"preset: name must be one of {', '.join(sorted(known))}, got {name!r}")
    return {**known[name], **changes}


def presets() -> dict[str, dict[str, Any]]:
    """Arguments of the transformers of all families' presets, by name."""
    return {key: values for name in names() for key, values in get(name).presets.items()}
