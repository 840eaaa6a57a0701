# SPDX-License-Identifier: Apache-2.0
"""What a face should feel, and when: pictures of expressions along the time of a video."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT

_SPAN = re.compile(r"(.+)@(\d+(?:\.\d*)?|\.\d+)-((?:\d+(?:\.\d*)?|\.\d+)?)")
NONE = -1  # the index of frames that follow no picture


@dataclass(frozen=True)
class Emotion:
    """A picture of an expression, and from when to when the face follows it, in seconds.

    Raises:
        ValueError: it begins at or after its end.
    """

    picture: Path
    start: float = 0.0
    end: float = float("inf")

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"must have a start before its end, got {self.start:g}-{self.end:g}")

    def __str__(self) -> str:
        end = "" if self.end == float("inf") else f"{self.end:g}"
        whole = not self.start and not end
        return str(self.picture) if whole else f"{self.picture}@{self.start:g}-{end}"


def read_emotion(text: str) -> Emotion:
    """From PICTURE, PICTURE@START-END or PICTURE@START-, times in seconds.

    Raises:
        ValueError: something else.
    """
    if match := _SPAN.fullmatch(text):
        return Emotion(Path(match[1]).expanduser(), float(match[2]), float(match[3] or "inf"))
    if not text:
        raise ValueError("must be PICTURE or PICTURE@START-END, got nothing")
    return Emotion(Path(text).expanduser())


def emotion_index(emotions: Sequence[Emotion], latents: int, fps: float) -> list[int]:
    """Which picture every latent frame of a video follows, -1 for none.

    Where spans overlap, the one that was named last counts. A latent frame follows what counts in the middle of its
    video frames: latent 0 is frame 0, latent k is frames 4 k - 3 .. 4 k.
    """
    found = []
    for latent in range(latents):
        frame = 0.0 if latent == 0 else FRAMES_PER_LATENT * latent - (FRAMES_PER_LATENT - 1) / 2
        time = (frame + 0.5) / fps
        counting = [i for i, emotion in enumerate(emotions) if emotion.start <= time < emotion.end]
        found.append(counting[-1] if counting else NONE)
    return found
