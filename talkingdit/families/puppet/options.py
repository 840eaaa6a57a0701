# SPDX-License-Identifier: Apache-2.0
"""What may be said about a video of a drawn character."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from talkingdit.families.flag import Flag, GenerationOptions, check_step_cache


@dataclass(frozen=True, kw_only=True)
class Options(GenerationOptions):
    """None takes what the checkpoint suggests."""

    small: ClassVar[bool] = True

    text_guidance: Annotated[float | None, Flag("G")] = None
    """how strictly to follow the prompt (default: of the checkpoint)"""
    audio_guidance: Annotated[float | None, Flag("G")] = None
    """how strongly to follow the voice (default: of the checkpoint)"""
    sequential: bool = False
    """less memory, more time: one prediction after the other"""
    generated_clothes: bool = False
    """show the clothes as the model makes them; else the chest, with its logo, is the portrait's"""
    step_cache: Annotated[float, Flag("T")] = 0.0
    """skip denoising steps whose input has changed by less than T since the last one that was not: 0.05 to 0.3"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step_cache(self.step_cache)
        for name in ("text_guidance", "audio_guidance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"generate: {name} must be a number of at least 0, got {value}")
