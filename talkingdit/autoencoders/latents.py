# SPDX-License-Identifier: Apache-2.0
"""How much of a video a latent of the Wan and HunyuanVideo autoencoders is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FRAMES_PER_LATENT = 4  # after the first latent of a video, which is one frame
PIXELS_PER_LATENT = 8  # along a side


def latent_size(size: tuple[int, int]) -> tuple[int, int]:
    """Latent rows and columns of frames of a height and width in pixels."""
    return size[0] // PIXELS_PER_LATENT, size[1] // PIXELS_PER_LATENT


def patchify(video: Tensor, size: int) -> Tensor:
    """Squares of pixels to channels, as of Wan 2.2: [B, C, T, H, W] -> [B, C * size^2, T, H / size, W / size]."""
    video = video.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # [B, C, T, H', y, W', x]
    return video.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(video: Tensor, size: int) -> Tensor:
    """The inverse of `patchify`."""
    video = video.unflatten(1, (-1, size, size))  # [B, C, x, y, T, H', W']
    return video.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
