# SPDX-License-Identifier: Apache-2.0
"""Files of a job to the conditions that all windows of its video share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from talkingdit.autoencoders.codec import Codec, still
from talkingdit.autoencoders.latents import latent_size
from talkingdit.autoencoders.streaming import to_video
from talkingdit.distributed.layout import Parallel
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.outline import Details
from talkingdit.families.hunyuan_avatar.voices import HeardVoice, feature_shape, hear
from talkingdit.families.hunyuan_avatar.windows import VideoConditions, cell_masks
from talkingdit.families.hunyuan_avatar.words import Words, read_words, same_length
from talkingdit.media.framing import fit_image

if TYPE_CHECKING:
    from talkingdit.families.hunyuan_avatar.checkpoint import HunyuanAvatarCheckpoint
    from talkingdit.pipelines.inputs import Frames, Inputs, Outline


@torch.no_grad()
def encode(
    checkpoint: HunyuanAvatarCheckpoint, codec: Codec, inputs: Inputs, outline: Outline, parallel: Parallel
) -> VideoConditions:
    """See `VideoConditions`. Rank 0 alone reads and encodes; the others are given the results.

    Raises:
        UserError: text features do not fit the model, or it has no module for emotions that are asked for.
    """
    details: Details = outline.details
    team, device = parallel.team, checkpoint.transformer.device
    picture = squeezed(inputs.image, outline.size)
    reference = team.broadcast(lambda: codec.encode(still(to_video(picture[None]), checkpoint.settings.window)), device)
    emotion = None
    if details.emotions:
        emotion = team.broadcast(lambda: _emotions(codec, details, outline.size), device)
    rows, columns = latent_size(outline.size)
    strength = [voice.speaker.strength * details.options.audio_strength for voice in details.voices]
    return VideoConditions(
        details=details,
        words=_words(checkpoint, details, picture, parallel),
        reference=reference,
        voices=tuple(_voices(checkpoint, details, parallel)),
        masks=cell_masks(details.voices, (rows, columns)).to(device),
        strength=torch.tensor([strength], device=device),
        emotion=emotion,
        emotion_index=torch.tensor(details.emotion_index),
        silence=checkpoint.settings.silence,
        still=checkpoint.settings.still,
    )


def squeezed(image: Frames, size: tuple[int, int]) -> Frames:
    """The portrait in the size of the video, as the released program brings it there: all of it, a little squeezed."""
    from PIL import Image

    if image.shape[:2] == size:
        return image
    return np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def _emotions(codec: Codec, details: Details, size: tuple[int, int]) -> Tensor:
    """Latents [1, E, C, 1, h, w] of the pictures, cut to the shape of the video."""
    found = [codec.encode(to_video(fit_image(picture, size, cover=True)[0][None])) for picture in details.emotions]
    return torch.cat(found)[None]


def _words(
    checkpoint: HunyuanAvatarCheckpoint, details: Details, picture: Frames, parallel: Parallel
) -> tuple[Words, Words]:
    device = checkpoint.transformer.device

    def made() -> tuple[Words, Words]:
        if details.options.text_features is not None:
            both = read_words(details.options.text_features)
            _check_words(checkpoint, both[0], details)
        else:
            encoder = checkpoint.text_encoder
            both = (encoder.encode(details.prompt, picture), encoder.encode(details.negative_prompt, picture))
        one, other = same_length(*both)
        return Words(*(x.cpu() for x in one)), Words(*(x.cpu() for x in other))

    one, other = parallel.team.on_rank_0(made) if parallel.team.size > 1 else made()
    return Words(*(x.to(device) for x in one)), Words(*(x.to(device) for x in other))


def _check_words(checkpoint: HunyuanAvatarCheckpoint, words: Words, details: Details) -> None:
    config: Any = checkpoint.transformer.config
    for name, wanted, got in (
        ("text", config.text_states_dim, words.features.shape[2]),
        ("pooled", config.text_states_dim_2, words.pooled.shape[1]),
    ):
        if wanted != got:
            raise UserError(
                f"{details.options.text_features}: expected {name} features of width {wanted}, as the model has, "
                f"got {got}."
            )


def _voices(checkpoint: HunyuanAvatarCheckpoint, details: Details, parallel: Parallel) -> list[HeardVoice]:
    """Every voice as the speech encoder hears it, on rank 0; the others ask it for what they need."""
    encoder, team = checkpoint.audio_encoder, parallel.team
    frames = details.length.frames
    if team.size == 1:
        return [hear(encoder, voice.sound, frames) for voice in details.voices]
    shape = feature_shape(encoder)

    def made() -> None:
        for voice in details.voices:
            heard.append(hear(encoder, voice.sound, frames))

    heard: list[HeardVoice] = []
    team.on_rank_0(made)
    return [_Shared(team, heard, i, shape) for i in range(len(details.voices))]


class _Shared:
    """A voice that rank 0 has heard, on every process of a team: each asks for the same frames at the same time."""

    def __init__(self, team: object, heard: list[HeardVoice], index: int, shape: tuple[int, int, int]):
        self._team, self._heard, self._index, self._shape = team, heard, index, shape

    def at(self, frames: Tensor) -> Tensor:
        return self._team.broadcast(lambda: self._heard[self._index].at(frames), "cpu")  # type: ignore[attr-defined]
