# SPDX-License-Identifier: Apache-2.0
"""What of a video is given to the model: latents of the given pixels, and a mask of what it is to make (section 2.3).

The paper makes one model of two tasks by a binary mask: of an animated picture the first frame is given and the others
are not, of an edited video all frames are, but for boxes on lower faces. What is not given is grey. The mask is
max-pooled to the size of latents; the text leaves open of which kind its ones are. Here a cell is to be made if any of
its pixels is, in any of its four frames, and all of it is grey: so nothing of a mouth stays given. The model sees one
minus that, as in the base, where one is what is given; it stands in all mask channels, of which the base has four.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from talkingdit.autoencoders.streaming import to_video
from talkingdit.autoencoders.strips import Autoencoder
from talkingdit.families.skyreels_audio.outline import Edit
from talkingdit.media.framing import Frames
from talkingdit.media.mouths import Mask, cell_masks

WARM_UP = 8  # latents that the autoencoder sees before those of a clip


@dataclass(frozen=True)
class Given:
    """Of some latents of a video.

    Args:
        latents: [1, C, n, H, W] of its pixels, grey where they are not given.
        made: [n, H, W], one where the model makes the video.
    """

    latents: Tensor
    made: Tensor

    def condition(self, frames: Tensor, first: Tensor, channels: int) -> Tensor:
        """Channels behind the noisy ones for a window: mask and latents, [1, channels + C, f, H, W].

        Args:
            frames: int64 [f], which of the latents.
            first: [1, C, 1, H, W] of the reference, which stands in the first place of every window.
            channels: of the mask.
        """
        latents, given = self.latents[:, :, frames].clone(), 1 - self.made[frames]
        latents[:, :, :1] = first.to(latents)
        given[0] = 1
        return torch.cat([given.to(latents).expand(1, channels, *given.shape), latents], dim=1)


def grey_out(video: Tensor, made: Tensor) -> Tensor:
    """Pixels [1, 3, 1 + 4 n, 8 H, 8 W] in -1..1, grey in the cells made [1 + n, H, W] that the model makes."""
    rows = torch.cat([made[:1], made[1:].repeat_interleave(FRAMES_PER_LATENT, 0)]) > 0
    pixels = rows.repeat_interleave(PIXELS_PER_LATENT, 1).repeat_interleave(PIXELS_PER_LATENT, 2)
    return video.masked_fill(pixels.to(video.device), 0.0)


def read_frames(edit: Edit, first: int, count: int) -> tuple[Frames, Mask]:
    """Frames and masks of an edited video as the model sees them; after its end the last frame goes on."""
    frames = np.stack([edit.crop.see(frame) for frame in edit.video.read(min(first, edit.video.frames - 1), count)])
    masks = np.stack([edit.crop.see_mask(mask) for mask in _masks(edit, first, count)])
    missing = count - len(frames)
    return np.concatenate([frames, frames[-1:].repeat(missing, axis=0)]) if missing else frames, masks


def _masks(edit: Edit, first: int, count: int) -> Iterator[Mask]:
    for number in range(first, first + count):
        yield edit.region.masks(min(number, edit.video.frames - 1), 1)[0]


def masked_clip(edit: Edit, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Pixels and cells of latents of an edited video, with some before them, for the autoencoder.

    The first frame of the video is given whole.

    Args:
        first, last: the latents, `last` not included.

    Returns:
        Pixels [1, 3, 1 + 4 k, 8 H, 8 W] in -1..1, and which cells the model makes, [last - first, H, W].
    """
    begin = max(0, first - 1 - WARM_UP)
    frames, masks = read_frames(edit, FRAMES_PER_LATENT * begin, 1 + FRAMES_PER_LATENT * (last - 1 - begin))
    made = torch.from_numpy(cell_masks(masks))
    if begin == 0:
        made[0] = 0
    return grey_out(to_video(frames), made), made[first - begin :]


def given_of(pixels: Tensor, made: Tensor, vae: Autoencoder) -> Given:
    """What `masked_clip` found, encoded."""
    return Given(vae.encode(pixels.to(vae.device))[:, :, -len(made) :], made)
