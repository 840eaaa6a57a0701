# SPDX-License-Identifier: Apache-2.0
"""The size of a video, and images and pictures of poses brought to it, as the official program of Wan-S2V does it.

An image keeps its shape as well as sides that are multiples of 64 allow: its shorter side is resized to that of the
video and the middle is cut out. Where the video is longer than the resized image, the official program fills up with
black on both sides; `cover` resizes a little more instead, so that nothing is black.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from talkingdit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Frames = NDArray[np.uint8]
TRIES = 100  # scales that the official search looks at


def output_size(height: int, width: int, max_area: int, multiple: int = 64) -> tuple[int, int]:
    """Height and width of the video for an image: multiples of `multiple` with at most `max_area` pixels.

    The scale is the largest of 100, from the one that fills the area to one that surely fits (an image that is small
    enough already: from 1 to 0.1), whose sides, filled up to multiples, fit.

    Args:
        height, width: of the image.
        max_area: pixels.

    Raises:
        UserError: not even the smallest sides of this shape fit.
    """
    if height * width <= max_area:
        low, high = 0.1, 1.0
    else:
        # Sides grow by multiple - 1 at most: (s h + d) (s w + d) = max_area, solved as the official program solves it.
        d = multiple - 1
        a, b, c = height * width, d * (height + width), d * d - max_area
        low = (math.sqrt(max(b * b - 2 * a * c, 0.0)) - b) / (2 * a)
        high = math.sqrt(max_area / a)
    for i in range(TRIES):
        scale = high - (high - low) * i / TRIES
        found = [-(-int(side * scale) // multiple) * multiple for side in (height, width)]
        if found[0] * found[1] <= max_area and min(found) > 0:
            return found[0], found[1]
    ratio = width / height
    sides = [
        int((max_area / ratio) ** 0.5 // multiple * multiple),
        int((max_area * ratio) ** 0.5 // multiple * multiple),
    ]
    if sides[1] >= width or sides[0] >= height:
        sides = [side // multiple * multiple for side in (height, width)]
    if min(sides) < multiple:
        raise UserError(
            f"size: an image of {width} x {height} pixels does not fit into {max_area} pixels with sides that are "
            f"multiples of {multiple}; allow a larger area, or give the size."
        )
    return sides[0], sides[1]


def _resized(shape: tuple[int, ...], size: tuple[int, int], cover: bool = False) -> tuple[int, int]:
    """Height and width to resize to before cutting out the middle."""
    height, width = shape[:2]
    short = min(size)
    if height <= width:
        found = (short, int(short * width / height))
    else:
        found = (int(short * height / width), short)
    if cover and (found[0] < size[0] or found[1] < size[1]):
        scale = max(size[0] / height, size[1] / width)
        found = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    return found


def _middle(length: int, wanted: int) -> tuple[int, int, int]:
    """Where the middle begins, and what to fill up before and behind, along one side."""
    missing = max(wanted - length, 0)
    return round((length + missing - wanted) / 2), missing // 2, (missing + 1) // 2


def fit_image(image: Frames, size: tuple[int, int], cover: bool = False) -> tuple[Frames, int]:
    """Resize an image (bilinear, with antialiasing) and cut out its middle.

    Args:
        image: [H, W, 3] uint8 RGB.
        size: height and width of the result.
        cover: never fill up.

    Returns:
        [*size, 3] uint8, and how many rows or columns of black were filled in.
    """
    from PIL import Image

    height, width = _resized(image.shape, size, cover)
    resized = Image.fromarray(image)
    if (height, width) != image.shape[:2]:
        resized = resized.resize((width, height), Image.Resampling.BILINEAR)
    (top, above, below), (left, before, behind) = _middle(height, size[0]), _middle(width, size[1])
    padded = np.pad(np.asarray(resized), ((above, below), (before, behind), (0, 0)))
    cut = padded[top : top + size[0], left : left + size[1]]
    return np.ascontiguousarray(cut), above + below + before + behind


def fit_portrait(image: Frames, size: int) -> tuple[Frames, bool]:
    """Cut the middle square out of an image and resize it.

    Args:
        image: [H, W, 3] uint8 RGB.
        size: side of the result in pixels.

    Returns:
        [size, size, 3] uint8, and whether something was cut off.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(image[top : top + side, left : left + side])
    if side != size:
        import cv2

        how = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
        square = cv2.resize(square, (size, size), interpolation=how).astype(np.uint8, copy=False)
    return square, height != width


def fit_pose(frame: Frames, size: tuple[int, int]) -> Tensor:
    """One frame of a pose video, [H, W, 3] uint8, to [3, *size] float32 in -1..1, filled up with zeros (grey)."""
    import torch
    import torch.nn.functional as F

    video = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None] / 255.0 * 2.0 - 1.0
    height, width = _resized(frame.shape, size)
    if (height, width) != frame.shape[:2]:
        video = F.interpolate(video, (height, width), mode="bilinear", align_corners=False, antialias=True)
    (top, above, below), (left, before, behind) = _middle(height, size[0]), _middle(width, size[1])
    video = F.pad(video, (before, behind, above, below))
    return video[0, :, top : top + size[0], left : left + size[1]]
