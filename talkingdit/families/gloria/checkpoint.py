# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Gloria: a folder in the layout of diffusers with all parts.

    transformer/ vae/ text_encoder/ tokenizer/ image_encoder/ audio_encoder/ (and audio_processor/)
    pipeline.json, optional: `GloriaSettings`

The official layout of Wan I2V with a speech encoder wav2vec2.../ beside it is read, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from talkingdit.families.gloria.presets import CLASSES
from talkingdit.families.wan_i2v.checkpoint import WanI2VCheckpoint, WanI2VSettings, load_parts, owned

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GloriaSettings(WanI2VSettings):
    """How a checkpoint of Gloria is used (pipeline.json). Numbers of the paper's section 5 are lost in our copy."""

    COUNTS: ClassVar[tuple[str, ...]] = (*WanI2VSettings.COUNTS, "prefix_latents", "anchor_area")
    NUMBERS: ClassVar[tuple[str, ...]] = (*WanI2VSettings.NUMBERS, "audio_guidance")

    prefix_latents: int = 4  # last latents of a chunk that the next one begins with, section 4.3
    guidance: float = 4.5
    audio_guidance: float = 4.5
    anchor_area: int = 384 * 384  # most pixels of an anchor of a view or an expression
    unknown: str = "zeros"
    held: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_latents >= self.chunk_latents:
            raise ValueError(
                f"pipeline.json: prefix_latents must be less than chunk_latents ({self.chunk_latents}), "
                f"got {self.prefix_latents}"
            )


def owns(folder: Path) -> bool:
    """Is this folder a whole checkpoint of Gloria? By the class that its config.json names."""
    return owned(folder, CLASSES)


def read_settings(folder: Path) -> GloriaSettings:
    """How the checkpoint is used: pipeline.json, or the defaults.

    Raises:
        UserError: pipeline.json is not such a file, or has an impossible value.
    """
    file = folder / "pipeline.json"
    return GloriaSettings.load(file) if file.is_file() else GloriaSettings()


def load_checkpoint(folder: Path, dtype: torch.dtype, device: torch.device | str) -> WanI2VCheckpoint:
    """A whole checkpoint; see `talkingdit.families.wan_i2v.checkpoint.load_checkpoint`."""
    from talkingdit.families.gloria.load import LOADER

    return load_parts(folder, LOADER, read_settings(folder), dtype, device, audio=True)
