# SPDX-License-Identifier: Apache-2.0
"""What may be said about a video of a SkyReels-Audio checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from talkingdit.families.flag import AREA, SIDES, Flag, GenerationOptions
from talkingdit.pipelines.schedules import parse

Fusion = Literal["both", "one", "none"]


@dataclass(frozen=True, kw_only=True)
class Options(GenerationOptions):
    """None takes what the checkpoint suggests."""

    video: Annotated[Path | None, Flag("MP4")] = None
    """a video whose mouth is made to speak the voice; all else stays as it is. It takes the place of the portrait"""
    mask: Annotated[str, Flag("PNG|BOX")] = ""
    """where the video may change: x0,y0,x1,y1 in pixels, or a picture that is white there (default: faces are found)"""
    video_steps: Annotated[int | None, Flag("N")] = None
    """denoising steps that see all of the video; the rest see its first frame alone (default: all steps see it)"""
    size: Annotated[tuple[int, int] | None, SIDES] = None
    """exact size of the video, width and height (default: by the portrait)"""
    max_area: Annotated[int | None, AREA] = None
    """most pixels that the model makes, a number or WIDTHxHEIGHT (default: of the checkpoint)"""
    cover: bool = False
    """cut more of the portrait off where a side would be filled up with black"""
    frames: Annotated[int | None, Flag("N")] = None
    """frames at most (default: as the voice lasts, or the video)"""
    guidance: Annotated[str, Flag("G")] = ""
    """how strictly to follow the prompt: a number, linear:A:B, cosine:A:B, interval:G@BEGIN-END (default: 5)"""
    audio_guidance: Annotated[str, Flag("G")] = ""
    """how strongly to follow the voice, likewise (default: 4.5)"""
    printed_guidance: bool = False
    """equation 3 of the paper as it is printed, whose coefficients sum to 2"""
    shift: Annotated[float | None, Flag("S")] = None
    """of the noise levels (default: of the checkpoint)"""
    negative_prompt: Annotated[str | None, Flag("WORDS")] = None
    """what not to show (default: of the checkpoint)"""
    window: Annotated[int | None, Flag("N")] = None
    """latent frames that the model sees at once, of four frames each (default: of the checkpoint, 21)"""
    overlap: Annotated[int | None, Flag("N")] = None
    """latent frames that two windows share (default: of the checkpoint, 5)"""
    fusion: Fusion = "both"
    """of what windows share: both (bidirectional), one (the earlier one decides), none (the later one replaces it)"""
    windows: Annotated[int, Flag("N")] = 4
    """windows that are denoised together, and kept as a finished clip"""
    match_colour: bool = False
    """bring the colours of later clips of a portrait back to those of the first"""
    sequential: bool = False
    """less memory, more time: one prediction after the other"""
    memory: Annotated[str, Flag("SWITCHES")] = ""
    """fit a smaller card, in words that `plan` suggests: weights=cast_fp8,offload=block,text_encoder=cpu,vae=tiled"""
    # New options go behind the others: saved workflows of ComfyUI know values by their places.
    rescale_guidance: Annotated[float, Flag("R")] = 0.0
    """how much of the contrast that guidance adds is taken back, 0 to 1"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion not in get_args(Fusion):
            raise ValueError(f"generate: fusion must be one of {', '.join(get_args(Fusion))}, got {self.fusion!r}")
        for name, least in (("frames", 1), ("max_area", 1), ("window", 2), ("overlap", 1), ("windows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"generate: {name} must be at least {least}, got {value}")
        if self.video_steps is not None and self.video_steps < 0:
            raise ValueError(f"generate: video_steps must be at least 0, got {self.video_steps}")
        if not 0 <= self.rescale_guidance <= 1:
            raise ValueError(f"generate: rescale_guidance must be 0 to 1, got {self.rescale_guidance}")
        if self.shift is not None and not 0 < self.shift < float("inf"):
            raise ValueError(f"generate: shift must be a positive number, got {self.shift}")
        for name in ("guidance", "audio_guidance"):
            words = getattr(self, name)
            try:
                parse(words or "1")
            except ValueError as error:
                raise ValueError(f"generate: {name} {error}") from error
        for name in ("mask", "video_steps"):
            if getattr(self, name) and self.video is None:
                raise ValueError(f"generate: {name} needs a video (`--video`), got none")

    def files(self) -> dict[str, Path]:
        from talkingdit.media.boxes import read_box

        painted = self.mask and read_box(self.mask) is None
        return {**super().files(), **({"mask": Path(self.mask)} if painted else {})}
