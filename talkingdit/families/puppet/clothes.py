# SPDX-License-Identifier: Apache-2.0
"""The clothes of the portrait, laid over the generated ones: what speech does not move need not be guessed.

The autoencoder of the shipped model cannot hold a logo (a drawn star comes back as a blob), and its transformer paints
most logos gold within two seconds, whatever history it is given. Both are lost before a decoder could mend them. The
chest of a person who talks hardly moves, though: it slides sideways by a pixel. So the middle of the chest is taken
from the portrait, slid to where the shoulders of each frame are, behind a soft border.

Frames whose shoulders do not look like those of the portrait keep what was generated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# In frame sizes; a drawn person's logo lies within 0.07 of (0.5, 0.9).
BAND = 0.785  # the chest is below it
CHEST = (0.38, 0.62)  # columns of what is laid over
BORDER = 0.04  # over which the portrait gives way to the frame
REACH = 0.03  # how far a body slides to either side
SIMILAR, DIFFERENT = 0.2, 0.4  # RMS difference of the shoulders, of 2: up to which, and from which on, it is (not) used


def keep_clothes(portrait: Tensor) -> Callable[[Tensor], Tensor]:
    """What lays the chest of a portrait [1, 3, 1, S, S] over the frames of a video [1, 3, n, S, S], both in -1..1.

    Every frame is treated by itself, so a video may be cut anywhere.
    """
    picture, size = portrait[0, :, 0].float(), portrait.shape[-1]
    rows, columns = ((torch.arange(size) + 0.5) / size for _ in range(2))
    beside = ((columns < CHEST[0]) | (columns > CHEST[1])).float()
    shoulders = ((rows >= BAND)[:, None] * beside).to(picture.device)  # what is compared: not the logo itself
    across = torch.minimum(columns - CHEST[0], CHEST[1] - columns)
    soft = torch.minimum((rows - BAND)[:, None], across[None]).div(BORDER).clamp(0, 1).to(picture.device)

    def lay_over(video: Tensor) -> Tensor:
        frames = video[0].movedim(1, 0).float()
        aligned = _slide(picture, _offsets(picture, frames, shoulders))
        difference = ((aligned - frames).square().mean(1) * shoulders).sum((1, 2)) / shoulders.sum()
        trust = (DIFFERENT - difference.sqrt()).div(DIFFERENT - SIMILAR).clamp(0, 1)
        mixed = torch.lerp(frames, aligned, (trust[:, None, None] * soft)[:, None])
        return mixed.movedim(1, 0)[None].to(video.dtype)

    return lay_over


def _offsets(picture: Tensor, frames: Tensor, where: Tensor) -> Tensor:
    """Pixels [n] by which the picture [3, S, S] slides right to lie on frames [n, 3, S, S] (least squares)."""
    offsets = frames.new_zeros(len(frames))
    for _ in range(3):
        aligned = _slide(picture, offsets)
        wider = F.pad(aligned, (1, 1, 0, 0), mode="replicate")
        slope = (wider[..., 2:] - wider[..., :-2]) / 2
        error = ((aligned - frames) * slope * where).sum((1, 2, 3))
        offsets = offsets + error / ((slope.square() * where).sum((1, 2, 3)) + 1e-6)
        offsets = offsets.clamp(-REACH * picture.shape[-1], REACH * picture.shape[-1])
    return offsets


def _slide(picture: Tensor, offsets: Tensor) -> Tensor:
    """[n, 3, S, S]: the picture [3, S, S], slid to the right by so many pixels each, its edges repeated."""
    count, size = len(offsets), picture.shape[-1]
    theta = torch.zeros(count, 2, 3, device=picture.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    theta[:, 0, 2] = -2 * offsets / size
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    return F.grid_sample(picture.expand(count, -1, -1, -1), grid, padding_mode="border", align_corners=False)
