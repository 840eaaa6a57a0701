# SPDX-License-Identifier: Apache-2.0
"""LoRA files that are asked for in words, FILE[:STRENGTH]: read, checked before a model is loaded, put on the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from talkingdit.checkpoints.lora_choice import SETTING, LoraChoice, digest_of, told_apart
from talkingdit.errors import UserError
from talkingdit.families.flag import Flag

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


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """The flags of the command line, and the same in a form."""

    lora: Annotated[tuple[LoraChoice, ...], Flag("FILE[:STRENGTH]", read_choice, many=True)] = ()
    """a LoRA to apply, of any trainer; may be given again"""
    lora_partial: bool = False
    """apply what fits of a LoRA of which some parts fit nothing"""

    def check_files(self) -> None:
        """Raises: UserError: one of the files is not there."""
        for choice in self.lora:
            if not choice.path.exists():
                raise UserError(f"--lora: there is no file or folder {str(choice.path)!r}.")
            if not (choice.path.is_file() or choice.path.is_dir()):
                raise UserError(f"--lora: expected a file or folder, got a pipe or a device ({str(choice.path)!r}).")

    def checked(self, family: Family, folder: Path, outline: Outline) -> Outline:
        """The outline with what the LoRAs add to it: what finished clips depend on, and warnings.

        The files are read against a model without memory, so that one that does not fit is told at once.

        Raises:
            UserError: a file that does not fit the checkpoint.
        """
        if not self.lora:
            idle = ("`--lora-partial` has no effect without `--lora`.",) if self.lora_partial else ()
            return replace(outline, warnings=(*outline.warnings, *idle))
        from talkingdit.checkpoints.lora_files import read_lora

        model, warnings = family.load.empty(folder), []
        for choice in self.lora:
            file = read_lora(choice.path, model, self.lora_partial)
            warnings += [f"{choice.path}: {sentence}; left out." for sentence in file.left]
            if file.ignored:
                warnings.append(f"{choice.path}: {len(file.ignored)} parts for an image branch are left aside.")
            if not choice.strength:
                warnings.append(f"{choice.path} has no effect at strength 0.")
        kept = [told_apart(choice.strength, digest_of(choice.path), partial=self.lora_partial) for choice in self.lora]
        return replace(outline, warnings=(*outline.warnings, *warnings), settings={**outline.settings, SETTING: kept})

    def apply(self, model: Any, merge: bool) -> None:
        """Put the files on a model.

        Args:
            merge: into the weights, for good; otherwise beside them.

        Raises:
            UserError: a file that does not fit.
        """
        if not self.lora:
            return
        from talkingdit.checkpoints.lora import Loras

        loras = Loras(model)
        for number, choice in enumerate(self.lora):
            loras.load(choice.path, f"lora_{number}", choice.strength, partial=self.lora_partial)
        if merge:
            loras.merge(keep_originals=False)
