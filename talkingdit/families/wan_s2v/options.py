# SPDX-License-Identifier: Apache-2.0
"""What may be said about a video of a Wan-S2V checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from talkingdit.families.flag import (
    AREA,
    INTERVAL,
    SIDES,
    Flag,
    GenerationOptions,
    check_guidance_interval,
    check_step_cache,
)

Solver = Literal["unipc", "dpm++", "euler"]
Opening = Literal["hold", "cut"]


@dataclass(frozen=True, kw_only=True)
class Options(GenerationOptions):
    """None takes what the checkpoint suggests."""

    size: Annotated[tuple[int, int] | None, SIDES] = None
    """exact size of the video, width and height (default: by the portrait)"""
    max_area: Annotated[int | None, AREA] = None
    """most pixels of a frame, a number or WIDTHxHEIGHT (default: of the checkpoint, 1024x704)"""
    cover: bool = False
    """cut more of the portrait off where a side would be filled up with black"""
    pose: Annotated[Path | None, Flag("MP4")] = None
    """a video that shows how to move"""
    frames: Annotated[int | None, Flag("N")] = None
    """frames at most (default: as the voice lasts)"""
    clips: Annotated[int | None, Flag("N")] = None
    """clips at most (default: as the voice lasts)"""
    opening: Opening = "hold"
    """where the voice sounds before the first frame: hold that frame, or cut these 3/16 s of the voice"""
    official_timing: bool = False
    """frames 3/16 s before their sound, as the official program has it"""
    guidance: Annotated[float | None, Flag("G")] = None
    """how strictly to follow prompt and voice (default: of the checkpoint, 4.5)"""
    shift: Annotated[float | None, Flag("S")] = None
    """of the noise levels (default: of the checkpoint, 3)"""
    solver: Solver | None = None
    """of the denoising (default: of the checkpoint, unipc)"""
    negative_prompt: Annotated[str | None, Flag("WORDS")] = None
    """what not to show (default: of the checkpoint)"""
    clip_frames: Annotated[int | None, Flag("N")] = None
    """frames per clip, a multiple of 4 (default: of the checkpoint, 80)"""
    start_from_reference: Annotated[bool, Flag(also=("--start-from-ref",))] = False
    """begin with the portrait itself as the first frame"""
    match_colour: bool = False
    """bring the colours of later clips back to those of the first"""
    sequential: bool = False
    """less memory, more time: one prediction after the other"""
    step_cache: Annotated[float, Flag("T")] = 0.0
    """skip denoising steps whose input has changed by less than T since the last one that was not: 0.05 to 0.3"""
    memory: Annotated[str, Flag("SWITCHES")] = ""
    """fit a smaller card, in words that `plan` suggests: weights=cast_fp8,offload=block,text_encoder=cpu,vae=tiled"""
    compile: bool = False
    """compile the blocks of the model: slow to begin with, faster then"""
    guidance_interval: Annotated[str, INTERVAL] = "0-1"
    """shares of the steps that guidance is taken in, such as 0.2-0.8; the others make one prediction, in less time"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, words in (("opening", Opening), ("solver", Solver)):
            value = getattr(self, name)
            if value is not None and value not in get_args(words):
                raise ValueError(f"generate: {name} must be one of {', '.join(get_args(words))}, got {value!r}")
        for name in ("frames", "clips", "max_area"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"generate: {name} must be at least 1, got {value}")
        if self.clip_frames is not None and (self.clip_frames < 4 or self.clip_frames % 4):
            raise ValueError(f"generate: a clip must have a multiple of 4 frames, got {self.clip_frames}")
        if self.guidance is not None and not 1 <= self.guidance < float("inf"):
            raise ValueError(f"generate: guidance must be a number of at least 1, got {self.guidance}")
        check_step_cache(self.step_cache)
        check_guidance_interval(self.guidance_interval)
        if self.shift is not None and not 0 < self.shift < float("inf"):
            raise ValueError(f"generate: shift must be a positive number, got {self.shift}")
