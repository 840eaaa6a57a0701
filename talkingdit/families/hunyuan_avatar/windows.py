# SPDX-License-Identifier: Apache-2.0
"""What the transformer is given for a window of a video: its part of the voices, of the faces and of the emotions.

A video of N latents has 4 N video frames of sound, of which those behind the last shown one are silent. Latent l hears
the frames 4 l - 3 .. 4 l; the first latent of a window hears one frame, 4 l. Windows may wrap around the end of the
video, and so do their sounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.families.hunyuan_avatar.guidance import GuidanceView
from talkingdit.families.hunyuan_avatar.masks import small_masks
from talkingdit.families.hunyuan_avatar.outline import Details, PlacedVoice
from talkingdit.families.hunyuan_avatar.voices import HeardVoice
from talkingdit.families.hunyuan_avatar.words import Words


@dataclass(frozen=True)
class VideoConditions:
    """What all windows of a video have in common, made once.

    Attributes:
        words: of the prompt and the negative prompt, of one length.
        reference: [1, C, window, h, w], the picture as a video that stands still; its last latent stands for all later
            ones.
        voices: one per speaker.
        masks: [1, S, 1, h, w] float32, which part of the picture each of them moves, or [1, S, latents, h, w] of
            faces that move.
        strength: [1, S].
        emotion: [1, E, C, 1, h, w], or None.
        emotion_index: of every latent.
    """

    details: Details
    words: tuple[Words, Words]
    reference: Tensor
    voices: tuple[HeardVoice, ...]
    masks: Tensor
    strength: Tensor
    emotion: Tensor | None
    emotion_index: Tensor
    silence: str = "zeros"  # see `HunyuanAvatarSettings`
    still: str = "window"  # likewise

    def arguments(self, frames: Tensor, views: Sequence[GuidanceView], mask: float, fps: float) -> dict[str, Any]:
        """Arguments of the transformer besides latents and timestep, a sample per view.

        Args:
            frames: int64 [f], the latents of the window on the host.
            views: what each prediction is given.
            mask: that face masks are multiplied with.
            fps: video frames per second.
        """
        device, count = self.reference.device, len(views)
        chosen = [self.words[0 if view.text else 1] for view in views]
        heard = sound_frames(frames, self.latents)
        # [1, S, 4 f - 3, window, blocks, channels]
        audio = torch.stack([voice.at(heard) for voice in self.voices])[None].to(device)
        deaf = 0.0 if self.silence == "none" else mask
        masks = torch.tensor([mask if view.audio else deaf for view in views], device=device)
        found: dict[str, Any] = {
            "text": torch.cat([words.features for words in chosen]),
            "text_mask": torch.cat([words.mask for words in chosen]),
            "pooled_text": torch.cat([words.pooled for words in chosen]),
            "reference": _repeat(self.still_latents(frames), count),
            "audio": torch.cat([audio if view.audio else torch.zeros_like(audio) for view in views]),
            "face_mask": masks_of(self.masks, frames) * masks.view(-1, 1, 1, 1, 1),
            "strength": _repeat(self.strength, count),
            "fps": torch.full((count,), float(fps), device=device),
        }
        if self.emotion is not None:
            index = self.emotion_index[frames].to(device)[None]
            strength = self.details.options.emotion_strength
            found |= {
                "emotion": _repeat(self.emotion, count),
                "emotion_index": _repeat(index, count),
                "emotion_strength": strength,
            }
        return found

    def still_latents(self, frames: Tensor) -> Tensor:
        """The latents [1, C, f, h, w] of the picture that go beside those of a window, int64 [f]."""
        if self.still == "window":
            return self.reference[:, :, : len(frames)]
        return self.reference[:, :, still_places(frames, self.reference.shape[2]).to(self.reference.device)]

    @property
    def latents(self) -> int:
        """Of the whole video."""
        return len(self.emotion_index)


def still_places(latents: Tensor, length: int) -> Tensor:
    """Which of the `length` latents of a still video go beside those of a video, int64 [f], where it begins with it.

    The first latent of a video holds one frame and the others four, and those near the beginning still differ a little:
    beside its counterpart a latent shows the model where in the video it is. Behind the last one nothing changes.
    """
    return latents.clamp(max=length - 1)


def sound_frames(latents: Tensor, count: int) -> Tensor:
    """The video frames whose sound a window hears, int64 [4 f - 3].

    Args:
        latents: int64 [f], those of the window, modulo `count`.
        count: latents of the video.
    """
    last = FRAMES_PER_LATENT * latents
    rest = last[1:, None] - torch.arange(FRAMES_PER_LATENT - 1, -1, -1)
    return torch.cat([last[:1], rest.reshape(-1)]) % (FRAMES_PER_LATENT * count)


def cell_masks(voices: Sequence[PlacedVoice], size: tuple[int, int]) -> Tensor:
    """Masks of all voices, [1, S, 1 or latents, h, w]; see `VideoConditions`."""
    still = small_masks([voice.mask for voice in voices], size)
    if all(voice.moving is None for voice in voices):
        return still
    moving = [None if voice.moving is None else torch.from_numpy(voice.moving) for voice in voices]
    count = next(len(mask) for mask in moving if mask is not None)
    found = [still[0, i].expand(count, -1, -1) if mask is None else mask for i, mask in enumerate(moving)]
    return torch.stack(found)[None]


def masks_of(masks: Tensor, frames: Tensor) -> Tensor:
    """Masks [1, S, 1 or latents, h, w] of a window of latents, int64 [f] -> [1, S, 1 or f, h, w]."""
    return masks if masks.shape[2] == 1 else masks[:, :, frames.to(masks.device)]


def _repeat(x: Tensor, count: int) -> Tensor:
    return x.expand(count, *x.shape[1:])
