# SPDX-License-Identifier: Apache-2.0
"""How much of a video a latent of the Wan and HunyuanVideo autoencoders is."""

from __future__ import annotations

FRAMES_PER_LATENT = 4  # after the first latent of a video, which is one frame
PIXELS_PER_LATENT = 8  # along a side


def latent_size(size: tuple[int, int]) -> tuple[int, int]:
    """Latent rows and columns of frames of a height and width in pixels."""
    return size[0] // PIXELS_PER_LATENT, size[1] // PIXELS_PER_LATENT
