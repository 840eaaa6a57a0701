# SPDX-License-Identifier: Apache-2.0
"""A part of a video as Wan I2V is to learn it: the frame before it, which is given, and its n frames behind.

Both are encoded together: 1 + n / 4 latents, of which the first is that of the frame alone. It is the reference.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from talkingdit.autoencoders.streaming import to_video
from talkingdit.data.cutting import Cut, Item
from talkingdit.data.encoders import CheckpointEncoders, Encoders
from talkingdit.data.encoding import ClipReader, clip_reader
from talkingdit.data.sample import Sample
from talkingdit.families.wan_i2v.checkpoint import find_parts, read_settings

if TYPE_CHECKING:
    from talkingdit.data.clips import Frames
    from talkingdit.encoders.clip import PictureEncoder


class PictureEncoders(Encoders):
    """Encoders with one for pictures."""

    def __init__(self, *parts: Any, image: PictureEncoder | None = None):
        super().__init__(*parts)
        self.image_encoder = image

    def image(self, picture: Frames) -> torch.Tensor | None:
        """Features [L, image_dim] of a picture uint8 [1, H, W, 3]; None without an encoder."""
        return None if self.image_encoder is None else self.image_encoder.features(picture)[0].float().cpu()


class WanI2VEncoders(CheckpointEncoders):
    """Autoencoder, UMT5 and, where it is there, picture encoder of a Wan I2V checkpoint; the last goes with latents."""

    OFFERS: ClassVar[tuple[str, ...]] = ("latents", "text")
    hears: ClassVar[bool] = False

    def read_settings(self) -> Any:
        return read_settings(self.folder)

    def files(self) -> list[Path]:
        parts = find_parts(self.folder, has_image(self.folder), self.hears)
        used = [parts.vae, *([] if parts.image_encoder is None else [parts.image_encoder])]
        used += [parts.text_encoder, parts.tokenizer] if "text" in self.what else []
        return used + ([parts.audio_encoder] if "audio" in self.what and parts.audio_encoder is not None else [])

    def load(self) -> PictureEncoders:
        from talkingdit.autoencoders.wan import load_vae
        from talkingdit.encoders.clip import load_picture_encoder
        from talkingdit.encoders.umt5 import UMT5Encoder, load_tokenizer, load_umt5

        parts = find_parts(self.folder, has_image(self.folder), self.hears)
        vae = load_vae(parts.vae, torch.float32, self.device).requires_grad_(False)
        text = audio = image = None
        if "text" in self.what:
            umt5 = load_umt5(parts.text_encoder, self.dtype, self.device)
            text = UMT5Encoder(umt5, load_tokenizer(parts.tokenizer)).eval()
        if "audio" in self.what and parts.audio_encoder is not None:
            from talkingdit.encoders.wav2vec import load_speech_encoder

            audio = load_speech_encoder(parts.audio_encoder, self.device, fps=self.settings.fps)
        if parts.image_encoder is not None:
            image = load_picture_encoder(parts.image_encoder, self.device)
        return PictureEncoders(vae, self.settings, text, audio, image=image)


def has_image(folder: Path) -> bool:
    """Is a picture encoder among the files of a checkpoint?"""
    return (folder / "image_encoder").is_dir() or any(folder.glob("models_clip*.pth"))


encoders = WanI2VEncoders  # see `talkingdit.data.encoding.Clips`


def encode_clip(
    item: Item, cut: Cut, size: tuple[int, int], encoders: Encoders, rng: np.random.Generator, source: str = ""
) -> Sample:
    """See `talkingdit.data.encoding.EncodeClip`."""
    with clip_reader(item, cut, size, encoders, rng) as reader:
        return encoded(reader, source)


def first_frame(reader: ClipReader) -> Frames:
    """The frame before a clip, uint8 [1, *size, 3]."""
    # Read as of a clip that starts from it; the name of the clip stays that of the cut.
    return dataclasses.replace(reader, cut=dataclasses.replace(reader.cut, still=True)).reference()


def encoded(reader: ClipReader, source: str, **more: Any) -> Sample:
    """The sample of a reader, with the frame before its clip as the reference.

    Args:
        more: further fields of `Sample`.
    """
    encoders, first, frames = reader.encoders, first_frame(reader), reader.frames()
    if reader.item.entry.is_image:
        latents = encoders.latents(frames)
        latents = torch.cat([latents, latents], dim=1)
    else:
        latents = encoders.latents(torch.cat([to_video(first), to_video(frames)], dim=2))
    image = encoders.image(first) if isinstance(encoders, PictureEncoders) else None
    return reader.sample(source, latents[:, 1:], reference=latents[:, :1], image=image, audio=reader.speech(), **more)
