# SPDX-License-Identifier: Apache-2.0
"""Frames and masks of a part of a file, at the rate and size that training asks for.

Frame p is the frame nearest in time to `start` + p / fps seconds (the later one of two that are as near), whatever
the rate of the file is and whether it is constant. Everything that a file can do wrong is a `UserError` of one
sentence.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT, PIXELS_PER_LATENT
from talkingdit.data.manifest import IMAGES, Box
from talkingdit.errors import UserError
from talkingdit.media.files import read_image
from talkingdit.media.framing import fit_image
from talkingdit.media.opening import open_media

Frames = NDArray[np.uint8]


def times(start: float, first: int, count: int, fps: int) -> list[Fraction]:
    """When frames `first` .. `first + count - 1` are shown, in seconds of the file."""
    origin = Fraction(start).limit_denominator(1_000_000)
    return [origin + Fraction(p, fps) for p in range(first, first + count)]


def read_frames(path: Path, wanted: Sequence[Fraction]) -> Iterator[Frames]:
    """The frames of a video that are nearest to some times, upright.

    Decoding begins at the key frame before the first of them, or at the beginning of a file that cannot be searched.

    Args:
        path: a video.
        wanted: ascending seconds after its first frame.

    Yields:
        One uint8 [H, W, 3] RGB per time; the same array again where a frame is the nearest to several.

    Raises:
        UserError: the file does not exist, is no video, is damaged, or ends before the last time.
    """
    import av

    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist.")
    found = 0
    try:
        with open_media(path) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no frames.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.base_rate
            slack = Fraction(1, 2) / rate if rate else Fraction(1, 50)
            for frame in _nearest(_timed(container, stream, wanted[0]), wanted, slack):
                found += 1
                yield frame
    except (av.FFmpegError, OSError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        at = float(wanted[min(found, len(wanted) - 1)])
        raise UserError(f"{path} cannot be decoded at {at:.2f} s ({reason}).") from error
    if found < len(wanted):
        raise UserError(f"{path} ends before {float(wanted[found]):.2f} s.")


def _timed(container: Any, stream: Any, start: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Frames with their seconds after the first one, from at or before `start` on."""
    base = stream.time_base
    origin = Fraction((stream.start_time or 0) * base)
    if start > 0:
        container.seek(int((origin + start) / base), stream=stream)
    frames = container.decode(stream)
    if start > 0:
        frame = next(frames, None)
        if frame is None or frame.pts is None or frame.pts * base - origin > start:
            container.seek(0)
            frames = container.decode(stream)
        else:
            frames = itertools.chain([frame], frames)
    for number, frame in enumerate(frames):
        # Some files carry no times at all; their rate must do.
        at = Fraction(frame.pts * base) - origin if frame.pts is not None else number / Fraction(stream.average_rate)
        yield at, frame


def _nearest(frames: Iterator[tuple[Fraction, Any]], wanted: Sequence[Fraction], slack: Fraction) -> Iterator[Frames]:
    """The frame nearest to each time; the last frame serves times up to `slack` behind it."""
    chosen = 0
    before: tuple[Fraction, Any] | None = None
    for at, frame in frames:
        pixels: Frames | None = None  # of `before`, converted at most once
        while chosen < len(wanted) and at > wanted[chosen]:
            if before is None or at - wanted[chosen] <= wanted[chosen] - before[0]:
                break
            pixels = _upright(before[1]) if pixels is None else pixels
            yield pixels
            chosen += 1
        if chosen == len(wanted):
            return
        before = (at, frame)
    if before is not None:
        pixels = None
        while chosen < len(wanted) and wanted[chosen] <= before[0] + slack:
            pixels = _upright(before[1]) if pixels is None else pixels
            yield pixels
            chosen += 1


def _upright(frame: Any) -> Frames:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counter-clockwise, as numpy turns
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


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
