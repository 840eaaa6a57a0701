# SPDX-License-Identifier: Apache-2.0
"""What is asked of a model of drawn scenes, and what would be right: drawn, and through the autoencoder and back.

An autoencoder changes what the measures see: a mouth that stands still reads as one that moves a little behind it. So
figures of a model are to be seen beside these, which are no bound: a model may make what its autoencoder shows well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from talkingdit.autoencoders.codec import codec
from talkingdit.autoencoders.streaming import to_frames, to_video
from talkingdit.media.files import SPEECH_RATE
from talkingdit.puppets.measure import HeldOutVoice, truth_of
from talkingdit.puppets.render import Image
from talkingdit.puppets.scenes import Play
from talkingdit.puppets.world import FloatArray, Motion, Scene


@dataclass(frozen=True)
class Ask:
    """A video to make.

    Attributes:
        scene: who is in it, with closed mouths.
        voices: samples [n] at 16 kHz of everybody, None for who has none; or with `turns` one that all share.
        turns: (speaker, start, end) of the one recording.
        masks: whether speakers have their boxes.
        moods: (expression, start, end) that pictures tell, in seconds.
        mood_strength: how much faces follow them.
        seed: of the noise.
    """

    scene: Scene
    voices: Sequence[FloatArray | None]
    turns: Sequence[tuple[int, float, float]] = ()
    masks: bool = True
    moods: Sequence[tuple[str, float, float]] = ()
    mood_strength: float = 1.0
    seed: int = 0


def true_generator(vae: Any, size: int, fps: int) -> Callable[[Ask], Image]:
    """What a perfect model would make with an autoencoder: the right video, encoded and decoded."""
    autoencoder = codec(vae)

    @torch.no_grad()
    def generate(ask: Ask) -> Image:
        latents = autoencoder.encode(to_video(true_play(ask, fps).draw(size)))
        parts: list[Image] = []
        tail: Tensor | None = None
        for part in range(len(autoencoder.parts(latents.shape[2]))):
            frames, tail = autoencoder.decode(latents, part, tail)
            parts.append(to_frames(frames))
        return np.concatenate(parts)

    return generate


def true_play(ask: Ask, fps: int) -> Play:
    """What should happen in a video that is asked for; its length is 4 n - 3 frames, the last ones may be missing."""
    people = len(ask.scene.characters)
    given = [samples for samples in ask.voices if samples is not None]
    frames = -(-max(map(len, given)) * fps // SPEECH_RATE)
    frames = 4 * ((frames + 3) // 4) - 3
    openings, widths = np.zeros((people, frames), np.float32), np.full((people, frames), 0.5, np.float32)
    at = (np.arange(frames) + 0.5) / fps
    for i in range(people):
        samples = given[0] if ask.turns or not ask.masks else ask.voices[i]  # one for all, or everybody's own
        if samples is None:
            continue
        turns = ask.turns or [(i, 0.0, np.inf)]
        speaks = np.any([(who == i) & (start <= at) & (at < end) for who, start, end in turns], axis=0)
        said = truth_of(HeldOutVoice("", "", samples), frames, fps)
        openings[i], widths[i] = np.where(speaks, said.opening, 0), np.where(speaks, said.width, 0.5)
    rng = np.random.default_rng([ask.seed, people])
    moods = None
    if ask.moods and ask.mood_strength:
        moods = [next((mood for mood, _, end in ask.moods if t < end), ask.moods[-1][0]) for t in at]
    return Play(ask.scene, openings, widths, [Motion.random(rng, frames, fps) for _ in range(people)], moods)
