# SPDX-License-Identifier: Apache-2.0
"""Puts what was generated into a video, which stays to the last bit what it was where it may not change.

Two things hide the seam. Inside of the mask the generated frame comes in softly, over a border. And it is brought to
the colours around it first: what generated and given frame differ by outside of the mask, where both show the same, is
spread smoothly into the mask and added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from talkingdit.media.boxes import Box
from talkingdit.media.framing import Frames
from talkingdit.media.mouths import Mask

BORDER = 0.12  # of a mask's smaller side, over which the generated frame comes in
SPREAD = 0.25  # of it, how far differences of colour around the mask are spread


@dataclass(frozen=True)
class Crop:
    """The part of frames that a model sees, enlarged or reduced to its size.

    Args:
        top, left, height, width: of the part, in pixels of the video.
        size: height and width that the model sees.
    """

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]

    @property
    def part(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def see(self, frame: Frames) -> Frames:
        """A frame uint8 [H, W, 3] as the model sees it: [*size, 3]."""
        return self._resized(frame[self.part], self.size)

    def see_mask(self, mask: Mask) -> Mask:
        """A mask bool [H, W], likewise; what any pixel of is in the mask is."""
        found = self._resized(mask[self.part].astype(np.float32), self.size)
        return np.asarray(found > 0)

    def back(self, frame: Frames) -> Frames:
        """What the model made, uint8 [*size, 3], at its place's size: [height, width, 3]."""
        return self._resized(frame, (self.height, self.width))

    def _resized(self, image: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
        if image.shape[:2] == size:
            return image
        smaller = size[0] * size[1] < image.shape[0] * image.shape[1]
        how = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC if image.dtype == np.uint8 else cv2.INTER_LINEAR
        return cv2.resize(np.ascontiguousarray(image), (size[1], size[0]), interpolation=how)


def crop_around(bounds: Box, frame: tuple[int, int], max_area: int, multiple: int, context: float = 2.2) -> Crop:
    """The part of a video around a region that changes, as large as a model takes.

    A small frame is seen whole. Of a large one the surroundings of the region are seen, so that a mouth has as many
    pixels as the model can give it; never is the part so small that it would have to be enlarged.

    Args:
        bounds: of the region over the whole video.
        frame: height and width of the video.
        max_area: most pixels that the model sees.
        multiple: of which its sides are multiples.
        context: sides of the part in sides of the region, at least.

    Raises:
        ValueError: a frame smaller than `multiple`.
    """
    height, width = frame
    if min(frame) < multiple:
        raise ValueError(f"crop: frames must be at least {multiple} pixels high and wide, got {width} x {height}")
    x0, y0, x1, y1 = bounds
    tall, broad = context * (y1 - y0), context * (x1 - x0)
    least = max_area**0.5  # a part of so many pixels a side needs not be reduced
    tall, broad = min(height, max(tall, least)), min(width, max(broad, least))
    if height * width <= max_area:
        tall, broad = height, width
    scale = min(1.0, (max_area / (tall * broad)) ** 0.5)
    size = tuple(max(multiple, int(side * scale / multiple) * multiple) for side in (tall, broad))
    part = [min(whole, round(side / scale)) for side, whole in zip(size, frame, strict=True)]
    top = int(np.clip(round((y0 + y1 - part[0]) / 2), 0, height - part[0]))
    left = int(np.clip(round((x0 + x1 - part[1]) / 2), 0, width - part[1]))
    return Crop(top, left, part[0], part[1], (size[0], size[1]))


def soft(mask: Mask) -> NDArray[np.float32]:
    """Weights [H, W] of what is generated: 0 outside of the mask, rising to 1 inside of it; no border at the edges."""
    if not mask.any():
        return np.zeros(mask.shape, np.float32)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    border = max(1.0, BORDER * min(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1))
    padded = np.pad(mask.astype(np.uint8), 1, mode="edge")
    inside = (
        cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1] / border if not mask.all() else np.ones(mask.shape)
    )
    rise = np.clip(inside, 0, 1).astype(np.float32)
    return rise * rise * (3 - 2 * rise) * mask


def compose(frame: Frames, generated: Frames, mask: Mask, crop: Crop) -> Frames:
    """A frame with what was generated in its mask; every pixel outside of the mask is that of the frame.

    Args:
        frame: uint8 [H, W, 3] of the video.
        generated: uint8 [*crop.size, 3].
        mask: bool [H, W].
        crop: what the model saw of the frame.

    Returns:
        uint8 [H, W, 3].
    """
    here = frame[crop.part].astype(np.float32)
    inside = mask[crop.part]
    if not inside.any():
        return frame
    made = crop.back(generated).astype(np.float32)
    made += _spread(here - made, inside)
    weight = soft(inside)[..., None]
    mixed = np.clip(np.rint(here + weight * (made - here)), 0, 255).astype(np.uint8)
    result = frame.copy()
    result[crop.part] = np.where(inside[..., None], mixed, frame[crop.part])
    return result


def _spread(difference: NDArray[np.float32], inside: Mask) -> NDArray[np.float32]:
    """Differences [h, w, 3] outside of a mask, smoothly continued into it."""
    around = (~inside).astype(np.float32)
    if not around.any():
        return np.zeros_like(difference)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    sigma = max(1.0, SPREAD * min(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1))
    known = cv2.GaussianBlur(around, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    sums = cv2.GaussianBlur(difference * around[..., None], (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    return (sums / np.maximum(known, 1e-3)[..., None]).astype(np.float32)
