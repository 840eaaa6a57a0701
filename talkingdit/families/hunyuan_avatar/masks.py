# SPDX-License-Identifier: Apache-2.0
"""Masks that people give: a picture of where a face is, or a video in which it moves."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT, latent_size
from talkingdit.data.clips import all_frames, read_frames
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.places import Mask, Place, draw_mask
from talkingdit.families.hunyuan_avatar.speakers import Speaker
from talkingdit.media.files import read_image

if TYPE_CHECKING:
    from torch import Tensor

    from talkingdit.pipelines.inputs import Inputs


def read_mask(speaker: Speaker, inputs: Inputs) -> Mask:
    """A mask [H, W] in 0..1; of a video its first picture.

    Raises:
        UserError: no picture, one of another size than the portrait, or a black one.
    """
    assert speaker.mask is not None
    picture = next(read_frames(speaker.mask, [Fraction(0)])) if speaker.moves else read_image(speaker.mask)
    mask: Mask = picture.mean(axis=2, dtype=np.float32) / 255
    if mask.shape != inputs.image.shape[:2]:
        (height, width), (rows, columns) = mask.shape, inputs.image.shape[:2]
        raise UserError(
            f"{speaker.mask}: expected a mask of {columns} x {rows} pixels, as {inputs.job.image} has, "
            f"got {width} x {height}."
        )
    if mask.max() < 0.5 and not speaker.moves:  # a face may come in later
        raise UserError(f"{speaker.mask}: expected a picture that is white where the face is, got a dark one.")
    return mask


def moving_mask(speaker: Speaker, latents: int, fps: int, size: tuple[int, int]) -> Mask:
    """A mask [latents, h, w] of the latents' cells: the largest of a latent's frames, as clips of training have it.

    Where its video ends, the face stays where it is.

    Args:
        speaker: with a video as mask.
        latents: of the video to make.
        fps: its frames per second.
        size: its height and width.

    Raises:
        UserError: the file is damaged, or dark from beginning to end.
    """
    assert speaker.mask is not None
    cells = latent_size(size)
    found, last = np.zeros((latents, *cells), np.float32), 0
    mask = found[0]
    for number, picture in enumerate(all_frames(speaker.mask, fps)):
        last = -(-number // FRAMES_PER_LATENT)  # latent l shows frames 4 l - 3 .. 4 l
        if last == latents:
            break
        whole = draw_mask(Place(mask=picture.mean(axis=2, dtype=np.float32) / 255), size, size)
        mask = small_masks([whole], cells)[0, 0, 0].numpy()
        found[last] = np.maximum(found[last], mask)
    found[last + 1 :] = mask
    if found.max() < 0.5:
        raise UserError(f"{speaker.mask}: expected a video that is white where the face is, got a dark one.")
    return found


def small_masks(masks: Sequence[Mask], size: tuple[int, int]) -> Tensor:
    """Masks [H, W] of a video as [1, S, 1, h, w] of its latents, interpolated as in the released program."""
    import torch

    stacked = torch.stack([torch.from_numpy(mask) for mask in masks])[None].float()
    return torch.nn.functional.interpolate(stacked, size=size, mode="bilinear").unsqueeze(2)
