# SPDX-License-Identifier: Apache-2.0
"""A part of a video as SkyReels-Audio is to learn it: as of Wan I2V, with the clip that is given where it is edited.

Where a row of the manifest says where the lower face is (its region `lower_face`, a mask or a box), the clip is also
encoded with that part grey, behind the same first frame: what the model is given of a video that it edits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from talkingdit.autoencoders.streaming import to_video
from talkingdit.data.cutting import Cut, Item
from talkingdit.data.encoders import Encoders
from talkingdit.data.encoding import ClipReader, clip_reader
from talkingdit.data.sample import Sample
from talkingdit.families.skyreels_audio.checkpoint import read_settings, speech_folder
from talkingdit.families.skyreels_audio.known import grey_out
from talkingdit.families.training import EDITED
from talkingdit.families.wan_i2v.clips import PictureEncoders, WanI2VEncoders, encoded, first_frame


class SkyReelsAudioEncoders(WanI2VEncoders):
    """Autoencoder, UMT5, picture encoder and Whisper of a SkyReels-Audio checkpoint."""

    OFFERS: ClassVar[tuple[str, ...]] = ("latents", "text", "audio")
    hears = False  # not the speech encoder of the base

    def read_settings(self) -> Any:
        return read_settings(self.folder)

    def files(self) -> list[Path]:
        return super().files() + ([speech_folder(self.folder)] if "audio" in self.what else [])

    def load(self) -> PictureEncoders:
        from talkingdit.encoders.whisper import load_whisper
        from talkingdit.families.skyreels_audio.audio import WhisperTokens
        from talkingdit.families.skyreels_audio.load import read_config

        found = super().load()
        if "audio" in self.what:
            fps = self.settings.fps
            whisper = load_whisper(speech_folder(self.folder), self.device, fps=fps)
            found.audio_encoder = WhisperTokens(whisper, read_config(self.folder)["audio_layers"], fps)
        return found


encoders = SkyReelsAudioEncoders  # see `talkingdit.data.encoding.Clips`


def encode_clip(
    item: Item, cut: Cut, size: tuple[int, int], encoders: Encoders, rng: np.random.Generator, source: str = ""
) -> Sample:
    """See `talkingdit.data.encoding.EncodeClip`."""
    with clip_reader(item, cut, size, encoders, rng) as reader:
        sample = encoded(reader, source)
        if EDITED in sample.regions and not item.entry.is_image:
            sample.regions[EDITED] = (sample.regions[EDITED] > 0).float()
            sample.given = _given(reader, sample.regions[EDITED])
        return sample


def _given(reader: ClipReader, made: torch.Tensor) -> torch.Tensor:
    """Latents [C, T, H, W] of a clip that is grey where it is made anew, behind its first frame."""
    video = torch.cat([to_video(first_frame(reader)), to_video(reader.frames())], dim=2)
    behind = torch.cat([torch.zeros_like(made[:1]), made])
    return reader.encoders.latents(grey_out(video, behind))[:, 1:]
