# SPDX-License-Identifier: Apache-2.0
"""clips.py of a family that has an autoencoder alone: no history, no voice, no text encoder."""

from __future__ import annotations

from pathlib import Path

import torch

from talkingdit.autoencoders.wan import load_vae
from talkingdit.data.encoders import CheckpointEncoders, Encoders, PlainSettings
from talkingdit.data.encoding import encode_clip

__all__ = ["encode_clip", "encoders"]


class SilentEncoders(CheckpointEncoders):
    OFFERS = ("latents",)

    def read_settings(self) -> PlainSettings:
        return PlainSettings(fps=16)

    def files(self) -> list[Path]:
        return [self.folder / "vae"]

    def load(self) -> Encoders:
        return Encoders(load_vae(self.folder / "vae", torch.float32, self.device), self.settings)


encoders = SilentEncoders
