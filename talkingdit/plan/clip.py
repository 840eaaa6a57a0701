# SPDX-License-Identifier: Apache-2.0
"""The shape of a clip: what memory and work are counted of."""

from __future__ import annotations

from dataclasses import dataclass

FRAMES_PER_LATENT = 4  # of the autoencoders that compress time, after the first frame


@dataclass(frozen=True)
class ClipShape:
    """What is generated at once, or trained on.

    Args:
        height, width: pixels, multiples of 16.
        latents: latent frames of a clip, four frames each.
        history: latent frames of history; 0 for a first clip.
        steps: denoising steps.
        branches: predictions per step, 2 with guidance.
        batched: all branches in one forward.
        guided: steps with all branches, the others have one prediction; None: all.
        pose: with a pose video.

    Raises:
        ValueError: a side that is not a multiple of 16 pixels.
    """

    height: int
    width: int
    latents: int
    history: int = 0
    steps: int = 1
    branches: int = 1
    batched: bool = False
    pose: bool = False
    guided: int | None = None

    def __post_init__(self) -> None:
        check_sides(self.height, self.width)

    @property
    def batch(self) -> int:
        """Samples per forward."""
        return self.branches if self.batched else 1

    @property
    def frames(self) -> int:
        return FRAMES_PER_LATENT * self.latents

    @property
    def pixels(self) -> int:
        """Of a frame."""
        return self.height * self.width


def check_sides(height: int, width: int) -> None:
    """Raises: ValueError: a side that is not a multiple of 16 pixels."""
    if height < 16 or width < 16 or height % 16 or width % 16:
        raise ValueError(f"plan: sides must be multiples of 16 pixels, got {width} x {height}")


def latents_of(frames: int) -> int:
    """Latent frames of a clip of so many frames.

    Raises:
        ValueError: not a multiple of 4.
    """
    if frames < 1 or frames % FRAMES_PER_LATENT:
        raise ValueError(f"plan: a clip must have a multiple of {FRAMES_PER_LATENT} frames, got {frames}")
    return frames // FRAMES_PER_LATENT
