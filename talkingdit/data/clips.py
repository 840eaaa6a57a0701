# SPDX-License-Identifier: Apache-2.0
"""Frames and masks of a part of a file, at the rate and size that training asks for.

Frame p is the frame nearest in time to `start` + p / fps seconds (the later one of two that are as near), whatever
the rate of the file is and whether it is constant. Everything that a file can do wrong is a `UserError` of one
sentence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from talkingdit.data.manifest import Box
from talkingdit.errors import UserError
from talkingdit.media.container import MediaError, NoStreamError
from talkingdit.media.files import read_image
from talkingdit.media.framing import fit_image
from talkingdit.media.kinds import IMAGES
from talkingdit.media.reader import read_pictures
from talkingdit.media.timeline import timeline

Frames = NDArray[np.uint8]


def times(start: float, first: int, count: int, fps: int) -> list[Fraction]:
    """When frames `first` .. `first + count - 1` are shown, in seconds of the file."""
    origin = Fraction(start).limit_denominator(1_000_000)
    return [origin + Fraction(p, fps) for p in range(first, first + count)]


def read_frames(path: Path, wanted: Sequence[Fraction]) -> Iterator[Frames]:
    """The frames of a video that are nearest to some times, upright and with square pixels.

    Args:
        path: a video.
        wanted: ascending seconds after its first frame.

    Yields:
        One uint8 [H, W, 3] RGB per time; the same array again where a frame is the nearest to several.

    Raises:
        UserError: the file does not exist, is no video, is damaged, or ends before the last time.
    """
    found = 0
    for frame in _frames(path, wanted):
        found += 1
        yield frame
    if found < len(wanted):
        raise UserError(f"{path} ends before {float(wanted[found]):.2f} s.")


def all_frames(path: Path, fps: int) -> Iterator[Frames]:
    """The frames of a video from the first to the last, at another rate; otherwise as `read_frames`."""
    yield from _frames(path, (Fraction(p, fps) for p in itertools.count()))


def _frames(path: Path, wanted: Iterable[Fraction]) -> Iterator[Frames]:
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    try:
        begins = timeline(path).pictures
        yield from read_pictures(path, (t + (begins or 0) for t in wanted))
    except NoStreamError:
        raise UserError(f"{path} has no frames.") from None
    except MediaError as error:
        raise UserError(f"{path} cannot be decoded ({error}).") from error


def read_clip(path: Path, wanted: Sequence[Fraction], size: tuple[int, int]) -> Frames:
    """Frames [n, *size, 3] of a video, or of an image file, which is the same at all times.

    They are resized until they cover the size, and the middle is cut out.

    Raises:
        UserError: as `read_frames`.
    """
    if path.suffix.lower() in IMAGES:
        return np.repeat(fit_image(read_image(path), size, cover=True)[0][None], len(wanted), axis=0)
    clip = np.empty((len(wanted), *size, 3), np.uint8)
    last: Frames | None = None
    for i, frame in enumerate(read_frames(path, wanted)):
        clip[i] = clip[i - 1] if frame is last else fit_image(frame, size, cover=True)[0]
        last = frame
    return clip


def read_mask(region: Path | Box, wanted: Sequence[Fraction], size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """How much of every latent cell a region covers, framed as the frames of a clip are.

    Args:
        region: a mask, white inside, or a box (x0, y0, x1, y1) in parts of the frame.
        wanted: when the frames of a clip are shown, a multiple of 4 or 1.
        size: height and width of the frames, multiples of 8.
        shape: height and width of the video that a box belongs to.

    Returns:
        [T, H, W] float32 in 0..1, the largest of the frames of a latent.

    Raises:
        UserError: as `read_frames`.
    """
    if isinstance(region, Path):
        masks = read_clip(region, wanted, size)
    else:
        mask = np.zeros((*shape, 3), np.uint8)
        x0, y0, x1, y1 = (side * length for side, length in zip(region, (*shape[::-1], *shape[::-1]), strict=True))
        mask[round(y0) : max(round(y1), round(y0) + 1), round(x0) : max(round(x1), round(x0) + 1)] = 255
        masks = np.repeat(fit_image(mask, size, cover=True)[0][None], len(wanted), axis=0)
    cells = F.avg_pool2d(torch.from_numpy(masks[..., 0].copy()).float()[:, None] / 255.0, PIXELS_PER_LATENT)[:, 0]
    return cells.view(-1, min(FRAMES_PER_LATENT, len(cells)), *cells.shape[1:]).amax(1)
