# SPDX-License-Identifier: Apache-2.0
"""What may be said about a video of a Wan I2V checkpoint, and of families on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, get_args

from talkingdit.families.flag import (
    AREA,
    INTERVAL,
    SIDES,
    Flag,
    GenerationOptions,
    check_guidance_interval,
    check_step_cache,
)
from talkingdit.families.wan_s2v.options import Solver


@dataclass(frozen=True, kw_only=True)
class WanI2VOptions(GenerationOptions, ABC):
    """What families on Wan I2V have in common; None takes what the checkpoint suggests.

    New options are fields of each family's `Options`, behind its others: saved workflows of ComfyUI know values by
    their places.
    """

    size: Annotated[tuple[int, int] | None, SIDES] = None
    """exact size of the video, width and height (default: by the picture)"""
    max_area: Annotated[int | None, AREA] = None
    """most pixels of a frame, a number or WIDTHxHEIGHT (default: of the checkpoint)"""
    cover: bool = False
    """cut more of the picture off where a side would be filled up with black"""
    frames: Annotated[int | None, Flag("N")] = None
    """frames at most (default: as the sound lasts)"""
    guidance: Annotated[float | None, Flag("G")] = None
    """how strictly to follow the prompt (default: of the checkpoint)"""
    shift: Annotated[float | None, Flag("S")] = None
    """of the noise levels (default: of the checkpoint)"""
    solver: Solver | None = None
    """of the denoising (default: of the checkpoint, unipc)"""
    negative_prompt: Annotated[str | None, Flag("WORDS")] = None
    """what not to show (default: of the checkpoint)"""
    chunk_latents: Annotated[int | None, Flag("N")] = None
    """latent frames generated at once, of four frames each (default: of the checkpoint)"""
    sequential: bool = False
    """less memory, more time: one prediction after the other"""
    step_cache: Annotated[float, Flag("T")] = 0.0
    """skip denoising steps whose input has changed by less than T since the last one that was not: 0.05 to 0.3"""
    memory: Annotated[str, Flag("SWITCHES")] = ""
    """fit a smaller card, in words that `plan` suggests: weights=cast_fp8,offload=block,text_encoder=cpu,vae=tiled"""
    compile: bool = False
    """compile the blocks of the model: slow to begin with, faster then"""

    @property
    @abstractmethod
    def guidance_interval(self) -> str:
        """Shares of the steps that guidance is taken in, BEGIN-END."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver is not None and self.solver not in get_args(Solver):
            raise ValueError(f"generate: solver must be one of {', '.join(get_args(Solver))}, got {self.solver!r}")
        for name, least in (("frames", 1), ("max_area", 1), ("chunk_latents", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"generate: {name} must be at least {least}, got {value}")
        self.check_guidance("guidance")
        check_step_cache(self.step_cache)
        check_guidance_interval(self.guidance_interval)
        if self.shift is not None and not 0 < self.shift < float("inf"):
            raise ValueError(f"generate: shift must be a positive number, got {self.shift}")

    def check_guidance(self, name: str) -> None:
        """Raises ValueError for a strength of guidance that is none."""
        value = getattr(self, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"generate: {name} must be a number of at least 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Options(WanI2VOptions):
    """None takes what the checkpoint suggests."""

    guidance_interval: Annotated[str, INTERVAL] = "0-1"
    """shares of the steps that guidance is taken in, such as 0.2-0.8; the others make one prediction, in less time"""
