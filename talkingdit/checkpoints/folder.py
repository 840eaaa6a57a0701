# SPDX-License-Identifier: Apache-2.0
"""Folders of one model each, as diffusers writes them: config.json beside *.safetensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from talkingdit.checkpoints.fill import build_empty, fill
from talkingdit.checkpoints.weights import open_weights, read_bounded
from talkingdit.errors import UserError

Place = tuple[torch.dtype, "torch.device | str"]


def load_part(cls: Any, folder: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A diffusers model from its folder with config.json and *.safetensors, strictly, tensor by tensor.

    Raises:
        UserError: another class, an impossible configuration, or weights that do not fit.
    """
    check_class(folder, (cls.__name__,))
    weights = open_weights(folder)
    model = build_empty(lambda: cls.from_config(cls.load_config(folder, local_files_only=True)), folder)
    return fill(model, weights, dtype, device)


def load_bare_part(cls: Any, name: str, arguments: Mapping[str, Any], folder: Path, place: Place) -> Any:
    """A model of a class without diffusers from such a folder, strictly, tensor by tensor.

    Args:
        cls: see `talkingdit.nn.configured`.
        name: of the class of diffusers in its place, for messages.
        arguments: of the class, see `bare_arguments`.

    Raises:
        UserError: an impossible configuration, or weights that do not fit.
    """
    model = build_empty(lambda: cls(**arguments), folder)
    return fill(model, open_weights(folder), *place, what=name)


def bare_arguments(cls: Any, name: str, folder: Path) -> dict[str, Any] | None:
    """Arguments of a class without diffusers that config.json gives; None where it names others or another class.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    values = read_bounded(folder / "config.json")
    if values.get("_class_name") != name:
        return None
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    return given if set(given) <= set(inspect.signature(cls).parameters) else None


def check_class(folder: Path, expected: tuple[str, ...]) -> str:
    """The class that config.json names.

    Raises:
        UserError: another one.
    """
    name = read_bounded(folder / "config.json").get("_class_name")
    if name not in expected:
        raise UserError(f"{folder / 'config.json'}: _class_name must be {' or '.join(expected)}, got {name!r}.")
    return name
