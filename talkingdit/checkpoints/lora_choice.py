# SPDX-License-Identifier: Apache-2.0
"""A LoRA file that is asked for, and how videos that were made with it are told from others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

SETTING = "choice of LoRAs"  # name of what finished clips depend on


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file that is asked for."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.path}:{self.strength:g}"


def told_apart(strength: float, digest: str, *, partial: bool = False, beside: bool = False) -> str:
    """What a video that a LoRA made depends on, in words.

    Args:
        strength: of the file.
        digest: of the file, see `digest_of`.
        partial: what does not fit was left out.
        beside: it was put beside the weights, not merged into them, which rounds differently.
    """
    return f"{strength:g} {digest}" + " partial" * partial + " beside" * beside


def digest_of(path: Path) -> str:
    """Of a file, or of all files of a folder."""
    found = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:32]
