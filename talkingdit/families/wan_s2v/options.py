# SPDX-License-Identifier: Apache-2.0
"""What may be said about a Wan-S2V video."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from talkingdit.families.family import GenerationOptions

OPENINGS = ("hold", "cut")


@dataclass(frozen=True, kw_only=True)
class Options(GenerationOptions):
    """Size, length, guidance and timing."""

    size: tuple[int, int] | None = None
    max_area: int | None = None
    cover: bool = False
    pose: Path | None = None
    frames: int | None = None
    clips: int | None = None
    opening: str = "hold"
    official_timing: bool = False
    guidance: float | None = None
    shift: float | None = None
    solver: str | None = None
    negative_prompt: str | None = None
    clip_frames: int | None = None
    start_from_reference: bool = False
    match_colour: bool = False
    sequential: bool = False
    memory: str = ""
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opening not in OPENINGS:
            raise ValueError(f"generate: opening must be one of {', '.join(OPENINGS)}, got {self.opening!r}")
        for name in ("frames", "clips", "max_area"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"generate: {name} must be at least 1, got {value}")
