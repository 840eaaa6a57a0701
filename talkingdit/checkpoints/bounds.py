# SPDX-License-Identifier: Apache-2.0
"""What settings may be at most: a folder may come from anyone, and what a billion layers take is not tried out."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from talkingdit.errors import UserError

MOST_SIDE = 8192  # pixels
MOST_AREA = MOST_SIDE * MOST_SIDE
MOST_VIDEO = 8192 * 4320  # pixels of a frame of H.264, at its highest level
# By the last part of a setting's name; no model has come near them.
MOST = {
    "fps": 240,
    "steps": 10_000,
    "infer_frames": 4096,
    "motion_frames": 4096,
    "clip_latents": 1024,
    "audio_history": 4096,
    "size": MOST_SIDE,
    "max_area": MOST_AREA,
    "clip_frames": 4096,
    "min_frames": 4096,
    "stride": 1 << 20,
    "upscale": 64,
    "threads": 4096,
    "workers": 4096,
    "multiple": MOST_SIDE,
    "tokens": 1 << 24,
    "shard_size": 1 << 20,  # megabytes
    "seed": (1 << 63) - 1,
}
MOST_JSON = 64 << 20  # bytes of a file of settings
SETTINGS = ("config.json", "pipeline.json", "model_index.json")
LAYERS, OTHERS, ITEMS = 1_000, 1 << 24, 10_000  # a number of layers or blocks, any other number, values in a list


def check_bounds(values: Any, where: object, name: str = "") -> None:
    """Are the numbers and lists of a configuration no larger than those of any model?

    Args:
        values: of JSON types, or dataclasses' fields.
        where: for messages.
        name: of the setting, dotted.

    Raises:
        UserError: names the setting.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            check_bounds(value, where, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        if len(values) > ITEMS:
            raise UserError(f"{where}: {name[:80]} must have at most {ITEMS} values, got {len(values)}.")
        for value in values:
            check_bounds(value, where, name)
    elif isinstance(values, int) and not -OTHERS <= values <= (most := _most(name)):
        bound = f"at most {most}" if values > 0 else f"at least {-OTHERS}"
        got = str(values) if abs(values) < 10**20 else f"one of {len(str(abs(values)))} digits"
        raise UserError(f"{where}: {name[:80]} must be {bound}, got {got}.")


def check_counts(values: Mapping[str, Any], like: Mapping[str, Any], where: object) -> None:
    """Are the settings of a configuration whole numbers where those of a released one are?

    Raises:
        UserError: names the setting.
    """
    for name, known in like.items():
        value, least = values.get(name, known), int(name in ("dim", "num_heads"))
        if type(known) is int and (type(value) is not int or value < least):
            raise UserError(
                f"{where}: {name[:80]} must be a whole number of at least {least}, got {str(value)[:40]!r}."
            )


def check_options(options: Any, command: str) -> None:
    """Are the numbers of a dataclass of options within bounds?

    Raises:
        ValueError: names the field, "generate: steps must be at most 10000, got ...".
    """
    for name, value in vars(options).items():
        try:
            check_bounds(value, command, name)
        except UserError as error:
            raise ValueError(str(error).removesuffix(".")) from None


def _most(name: str) -> int:
    last = name.rsplit(".", 1)[-1]
    counted = last.endswith(("layers", "blocks", "num_hidden_layers")) or last == "depth"
    return MOST.get(last, LAYERS if counted else OTHERS)


# ---- Folders ---------------------------------------------------------------------------------------------------------


def check_plain(folder: Path) -> None:
    """Can the files of a folder be looked into? For those who read settings of it to see whose it is.

    Raises:
        UserError: there is a pipe or a device, which may never end, or settings beyond all measure.
    """
    for place, _, names in os.walk(folder):
        for file in (Path(place) / name for name in names):
            try:
                status = file.stat()
            except OSError:
                continue  # told when it is read
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{file}: expected a file, got a pipe or a device; remove it from the checkpoint.")
            if file.name in SETTINGS:
                _check_settings(file, status.st_size)


def _check_settings(file: Path, size: int) -> None:
    """Is a file of settings of a size and depth that may be read?"""
    if size > MOST_JSON:
        raise UserError(f"{file}: expected at most {MOST_JSON >> 20} MB, got {size >> 20} MB.")
    try:
        json.loads(file.read_bytes())
    except RecursionError as error:
        raise UserError(f"{file}: not a readable JSON file ({error}).") from error
    except (OSError, ValueError):
        pass  # told when it is loaded
