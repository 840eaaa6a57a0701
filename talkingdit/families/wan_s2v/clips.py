# SPDX-License-Identifier: Apache-2.0
"""A part of a video as the model is to learn it: exactly what generation would give it for the same frames.

Wan-S2V generates clip by clip (see `pipeline.py`), and the autoencoder is causal: what latents hold depends on the
frames before them. So there are three kinds of clips.

    with history    The 73 frames before the clip and its n frames are encoded together: 19 + n / 4 latents. The first
                    19 are what encoding the 73 frames alone gives, which is the history that generation packs; the
                    others are the clip, which generation decodes behind them.
    beginning       The reference image and the n frames of the clip are encoded together: 1 + n / 4 latents. The first
                    one is that of the reference alone; generation decodes its first clip behind it.
    start           Where generation is told to start from the reference image, its history is grey and ends with six
                    times this image. So it is here; the reference is then the frame before the clip.

Frame p of an entry belongs to column p of the speech features, always. The reference is always encoded alone, and a
pose video with its first frame twice, as in generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from talkingdit.autoencoders.streaming import to_video
from talkingdit.data.clips import Frames, read_frames
from talkingdit.data.cutting import Cut, Item
from talkingdit.data.encoders import CheckpointEncoders, Encoders
from talkingdit.data.encoding import ClipReader, clip_reader
from talkingdit.data.sample import Sample
from talkingdit.families.wan_s2v.audio import LOOK_BACK
from talkingdit.families.wan_s2v.checkpoint import find_parts, read_settings
from talkingdit.families.wan_s2v.pipeline import STARTING_FRAMES
from talkingdit.media.framing import fit_pose

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.checkpoint import WanS2VSettings


class WanS2VEncoders(CheckpointEncoders):
    """Autoencoder, UMT5 and wav2vec 2.0 of a Wan-S2V checkpoint."""

    def read_settings(self) -> WanS2VSettings:
        return read_settings(self.folder)

    def files(self) -> list[Path]:
        parts = find_parts(self.folder)
        used = [parts.vae]
        used += [parts.text_encoder, parts.tokenizer] if "text" in self.what else []
        return used + ([parts.audio_encoder] if "audio" in self.what else [])

    def load(self) -> Encoders:
        from talkingdit.autoencoders.wan import load_vae
        from talkingdit.encoders.umt5 import UMT5Encoder, load_tokenizer, load_umt5
        from talkingdit.encoders.wav2vec import load_speech_encoder

        parts = find_parts(self.folder)
        vae = load_vae(parts.vae, torch.float32, self.device).requires_grad_(False)
        text = audio = None
        if "text" in self.what:
            umt5 = load_umt5(parts.text_encoder, self.dtype, self.device)
            text = UMT5Encoder(umt5, load_tokenizer(parts.tokenizer)).eval()
        if "audio" in self.what:
            audio = load_speech_encoder(parts.audio_encoder, self.device, fps=self.settings.fps)
        return Encoders(vae, self.settings, text, audio)


encoders = WanS2VEncoders  # see `talkingdit.data.encoding.Clips`


def encode_clip(
    item: Item, cut: Cut, size: tuple[int, int], encoders: Encoders, rng: np.random.Generator, source: str = ""
) -> Sample:
    """Any of the three kinds of clips: see `talkingdit.data.encoding.EncodeClip`."""
    with clip_reader(item, cut, size, encoders, rng) as reader:
        frames = reader.frames(encoders.settings.motion_frames if cut.history else 0)
        image = reader.reference()
        latents, history = _latents(reader, frames, image)
        before = min(LOOK_BACK, cut.start) if cut.history else 0
        columns = reader.speech(before)
        pose = item.entry.pose
        return reader.sample(
            source,
            latents,
            history=history,
            reference=encoders.latents(image),
            audio=None if columns is None else columns[..., before:],
            audio_history=None if columns is None or not before else columns[..., :before],
            pose=None if pose is None else _pose(pose, reader.times(), size, encoders),
        )


def _latents(reader: ClipReader, frames: Frames, image: Frames) -> tuple[Tensor, Tensor | None]:
    """Latents of the clip, encoded behind its past, and those of this past where it is a history.

    Args:
        frames: of the clip, behind those of its history.
        image: the reference.
    """
    cut, encoders = reader.cut, reader.encoders
    if reader.item.entry.is_image:
        return encoders.latents(frames), None
    video = to_video(frames)
    if not cut.history:
        before = to_video(image)
        if cut.still:
            grey = before.new_zeros(1, 3, encoders.settings.motion_frames - STARTING_FRAMES, *reader.size)
            before = torch.cat([grey, before.expand(-1, -1, STARTING_FRAMES, -1, -1)], dim=2)
        video = torch.cat([before, video], dim=2)
    encoded = encoders.latents(video)
    past = encoded.shape[1] - cut.latents
    return encoded[:, past:], encoded[:, :past] if cut.history or cut.still else None


def _pose(path: Path, shown: Sequence[Fraction], size: tuple[int, int], encoders: Encoders) -> Tensor:
    """Latents [C, T, H, W] of a pose video at the times of a clip."""
    video = torch.stack([fit_pose(frame, size) for frame in read_frames(path, shown)], dim=1)[None]
    return encoders.latents(torch.cat([video[:, :, :1], video], dim=2))[:, 1:]
