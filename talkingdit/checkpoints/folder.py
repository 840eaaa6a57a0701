# SPDX-License-Identifier: Apache-2.0
"""Folders of one model each, as diffusers writes them: config.json beside *.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from talkingdit.checkpoints.fill import build_empty, fill
from talkingdit.checkpoints.weights import open_weights, read_bounded
from talkingdit.errors import UserError


def load_part(cls: Any, folder: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A diffusers model from its folder with config.json and *.safetensors, strictly, tensor by tensor.

    Raises:
        UserError: another class, an impossible configuration, or weights that do not fit.
    """
    check_class(folder, (cls.__name__,))
    weights = open_weights(folder)
    model = build_empty(lambda: cls.from_config(cls.load_config(folder, local_files_only=True)), folder)
    return fill(model, weights, dtype, device)


def check_class(folder: Path, expected: tuple[str, ...]) -> str:
    """The class that config.json names.

    Raises:
        UserError: another one.
    """
    name = read_bounded(folder / "config.json").get("_class_name")
    if name not in expected:
        raise UserError(f"{folder / 'config.json'}: _class_name must be {' or '.join(expected)}, got {name!r}.")
    return name
