# SPDX-License-Identifier: Apache-2.0
"""A part of a video as the model is to learn it: what generation would give it for the same frames.

HunyuanVideo-Avatar knows no history: a clip begins where its autoencoder begins, with a latent of one video frame. So
of the 4 T frames of a cut the last 4 T - 3 are the clip. The picture is encoded as a video that stands still, as in
generation. Columns of speech are those of the 4 T frames, see `samples.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.autoencoders.codec import codec, still
from talkingdit.autoencoders.streaming import to_video
from talkingdit.data.cutting import Cut, Item
from talkingdit.data.encoders import CheckpointEncoders, Encoders, PlainSettings
from talkingdit.data.encoding import clip_reader
from talkingdit.data.sample import Sample
from talkingdit.families.hunyuan_avatar.checkpoint import find_parts, load_audio_encoder, load_vae, read_settings
from talkingdit.families.hunyuan_avatar.samples import NOT_OF_THE_CLIP, STILL, sample_columns

if TYPE_CHECKING:
    from talkingdit.families.hunyuan_avatar.words import AvatarTextEncoder


class _Columns:
    """A speech encoder of this family, as samples want its features."""

    def __init__(self, encoder: Any):
        self.encoder = encoder

    def features(self, waveform: Any, frames: int) -> Tensor:
        """[blocks, window * channels, frames]."""
        found = self.encoder.features(waveform, frames)
        return sample_columns(found) if found.dim() == 4 else found


class AvatarClipEncoders(Encoders):
    """Encoders in memory.

    Args:
        vae: of HunyuanVideo, or of Wan's kind.
        settings: of the checkpoint.
        words: text encoder of prompts with a picture; None leaves captions as they are.
        audio: speech encoder; None leaves sound out.
    """

    def __init__(self, vae: Any, settings: Any, words: AvatarTextEncoder | None, audio: Any):
        super().__init__(vae, settings, None, None if audio is None else _Columns(audio))
        self.words, self.codec = words, codec(vae)

    def latents(self, video: Tensor | np.ndarray) -> Tensor:
        """See `Encoders`."""
        pixels = to_video(video) if isinstance(video, np.ndarray) else video
        return self.codec.encode(pixels)[0].cpu()

    def text(self, caption: str) -> Tensor | None:
        """The empty caption with a grey picture; others need one, see `captioned`."""
        if caption:
            return None
        return self._texts.get("", lambda: self.captioned("", np.full((64, 64, 3), 128, np.uint8)))

    def captioned(self, caption: str, image: np.ndarray) -> Tensor | None:
        """Features [1 + L, dim] of a caption with a picture: the pooled ones, then tokens, zeros where none is."""
        if self.words is None:
            return None
        features, mask, pooled = (value[0].float().cpu() for value in self.words.encode(caption, image))
        features = features * mask[:, None]
        if pooled.shape[-1] == features.shape[-1]:
            return features
        return torch.cat([F.pad(pooled, (0, features.shape[-1] - len(pooled)))[None], features])


class HunyuanAvatarEncoders(CheckpointEncoders):
    """Autoencoder, text encoders and speech encoder of a checkpoint."""

    def read_settings(self) -> PlainSettings:
        settings = read_settings(self.folder)
        return PlainSettings(settings.fps, 0, settings.size_multiple)

    def files(self) -> Sequence[Path]:
        parts = find_parts(self.folder)
        named = {"text": (parts.text_encoder, parts.pooled_encoder), "audio": (parts.audio_encoder,)}
        used = [file for name, files in named.items() if name in self.what for file in files if file is not None]
        return [parts.vae, *used]

    def load(self) -> AvatarClipEncoders:
        from talkingdit.families.hunyuan_avatar.words import load_text_encoder

        parts = find_parts(self.folder)
        settings = dataclasses.replace(read_settings(self.folder), fps=self.settings.fps)
        words = audio = None
        if "text" in self.what:
            words = load_text_encoder(self.folder, parts.text_encoder, parts.pooled_encoder, self.dtype, self.device)
        if "audio" in self.what:
            audio = load_audio_encoder(parts, settings, self.device)
        vae = load_vae(parts.vae, self.device).requires_grad_(False)
        return AvatarClipEncoders(vae, self.settings, words, audio)


encoders = HunyuanAvatarEncoders  # see `talkingdit.data.encoding.Clips`


def encode_clip(
    item: Item, cut: Cut, size: tuple[int, int], encoders: Encoders, rng: np.random.Generator, source: str = ""
) -> Sample:
    """See `talkingdit.data.encoding.EncodeClip`."""
    with clip_reader(item, cut, size, encoders, rng) as reader:
        image = reader.reference()
        frames = reader.frames() if item.entry.is_image else reader.frames()[NOT_OF_THE_CLIP:]
        picture = encoders.latents(still(to_video(image), cut.latents))
        sample = reader.sample(source, encoders.latents(frames), reference=picture[:, :1], audio=reader.speech())
        sample.outside[STILL] = picture
        assert isinstance(encoders, AvatarClipEncoders)
        sample.text = encoders.captioned(item.entry.caption, image[0])
        return sample
