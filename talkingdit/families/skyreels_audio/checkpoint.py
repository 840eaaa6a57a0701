# SPDX-License-Identifier: Apache-2.0
"""SkyReels-Audio checkpoints: those of Wan I2V (`talkingdit.families.wan_i2v.checkpoint`) with a speech encoder.

    transformer/ vae/ text_encoder/ tokenizer/ image_encoder/     as of Wan I2V
    audio_encoder/      a Whisper model of transformers: config.json, weights, preprocessor_config.json
    pipeline.json       optional: `SkyReelsAudioSettings`

No checkpoint of the paper has been released: this is what `training` exports beside the parts of a Wan I2V folder.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from talkingdit.errors import UserError
from talkingdit.families.skyreels_audio.presets import CLASSES
from talkingdit.families.wan_i2v import checkpoint as base
from talkingdit.families.wan_i2v.checkpoint import WanI2VCheckpoint, WanI2VSettings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SkyReelsAudioSettings(WanI2VSettings):
    """How a checkpoint is used. "Not stated": the paper has no such number.

    Denoising takes Euler steps, one for all windows of a step; `solver` has no effect.
    """

    COUNTS: ClassVar[tuple[str, ...]] = (*WanI2VSettings.COUNTS, "overlap")
    NUMBERS: ClassVar[tuple[str, ...]] = (*WanI2VSettings.NUMBERS, "audio_guidance")

    fps: int = 25  # of portraits that speak; videos that are edited keep their own. Not stated
    steps: int = 50
    shift: float = 5.0  # not stated; that of the base for 540p
    audio_guidance: float = 4.5
    overlap: int = 5  # latents that windows share. Not stated
    max_area: int = 544 * 960
    unknown: str = "zeros"  # as training has it
    held: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap >= self.chunk_latents:
            raise ValueError(
                f"pipeline.json: overlap must be under chunk_latents = {self.chunk_latents}, got {self.overlap}"
            )


def owns(folder: Path) -> bool:
    """Is this folder a SkyReels-Audio checkpoint? By the class that its config.json names."""
    return base.owned(folder, CLASSES)


def read_settings(folder: Path) -> SkyReelsAudioSettings:
    """How the checkpoint is used: pipeline.json, or the defaults.

    Raises:
        UserError: pipeline.json is not such a file, or has an impossible value.
    """
    file = folder / "pipeline.json"
    return SkyReelsAudioSettings.load(file) if file.is_file() else SkyReelsAudioSettings()


def speech_folder(folder: Path) -> Path:
    """Of the speech encoder.

    Raises:
        UserError: there is none.
    """
    found = folder / "audio_encoder"
    if not found.is_dir():
        raise UserError(f"{folder}: not a whole checkpoint, the folder audio_encoder/ with a Whisper model is missing.")
    return found


def load_checkpoint(folder: Path, dtype: torch.dtype, device: torch.device | str) -> WanI2VCheckpoint:
    """A whole checkpoint.

    Args:
        dtype: of the transformer and the text encoder, the large parts. The others are float32.
        device: where all parts go.

    Raises:
        UserError: a part is missing or does not load, or the parts do not fit each other.
    """
    from talkingdit.encoders.whisper import load_whisper
    from talkingdit.families.skyreels_audio.audio import WhisperTokens
    from talkingdit.families.skyreels_audio.load import LOADER

    settings, speech = read_settings(folder), speech_folder(folder)
    without = base.load_parts(folder, LOADER, settings, dtype, device)
    whisper = load_whisper(speech, device, fps=settings.fps)
    encoder = WhisperTokens(whisper, without.transformer.config.audio_layers, settings.fps)
    checkpoint = dataclasses.replace(without, audio_encoder=encoder)
    base.check_fit(checkpoint)
    return checkpoint
