# SPDX-License-Identifier: Apache-2.0
"""`--lora FILE[:STRENGTH]`: read from the command line, checked before a model is loaded, and put on the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.checkpoints.lora_choice import SETTING, LoraChoice, digest_of, told_apart
from talkingdit.errors import UserError

if TYPE_CHECKING:
    from talkingdit.families import Family
    from talkingdit.pipelines.inputs import Outline


def read_choice(text: str) -> LoraChoice:
    """A file, or a file and its strength behind a colon. A file whose name ends like that is a file.

    Raises:
        ValueError: the strength is not finite, or there is no name.
    """
    path, colon, number = text.rpartition(":")
    try:
        strength = float(number) if colon and not Path(text).expanduser().exists() else None
    except ValueError:
        strength = None
    if strength is None:
        path, strength = text, 1.0
    if not path or not math.isfinite(strength):
        raise ValueError(f"must be FILE or FILE:STRENGTH, got {text!r}")
    return LoraChoice(Path(path).expanduser(), strength)


def check_files(choices: Sequence[LoraChoice]) -> None:
    """Raises: UserError: one of the files is not there."""
    for choice in choices:
        if not choice.path.exists():
            raise UserError(f"--lora: there is no file or folder {str(choice.path)!r}.")


def checked(choices: Sequence[LoraChoice], partial: bool, family: Family, folder: Path, outline: Outline) -> Outline:
    """The outline with what the LoRAs add to it: what finished clips depend on, and warnings.

    The files are read against a model without memory, so that one that does not fit is told at once.

    Raises:
        UserError: a file that does not fit the checkpoint.
    """
    if not choices:
        idle = ("`--lora-partial` has no effect without `--lora`.",) if partial else ()
        return replace(outline, warnings=(*outline.warnings, *idle))
    from talkingdit.checkpoints.lora_files import read_lora

    model, warnings = family.load.empty(folder), []
    for choice in choices:
        file = read_lora(choice.path, model, partial)
        warnings += [f"{choice.path}: {sentence}; left out." for sentence in file.left]
        if file.ignored:
            warnings.append(f"{choice.path}: {len(file.ignored)} parts for an image branch are left aside.")
        if not choice.strength:
            warnings.append(f"{choice.path} has no effect at strength 0.")
    kept = [told_apart(choice.strength, digest_of(choice.path), partial=partial) for choice in choices]
    return replace(outline, warnings=(*outline.warnings, *warnings), settings={**outline.settings, SETTING: kept})


def apply(choices: Sequence[LoraChoice], partial: bool, model: Any, merge: bool) -> None:
    """Put the files on a model.

    Args:
        merge: into the weights, for good; otherwise beside them.

    Raises:
        UserError: a file that does not fit.
    """
    if not choices:
        return
    from talkingdit.checkpoints.lora import Loras

    loras = Loras(model)
    for number, choice in enumerate(choices):
        loras.load(choice.path, f"lora_{number}", choice.strength, partial=partial)
    if merge:
        loras.merge(keep_originals=False)
