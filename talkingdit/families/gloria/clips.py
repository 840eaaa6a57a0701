# SPDX-License-Identifier: Apache-2.0
"""A part of a video as Gloria is to learn it, with anchors from all over its video ("superset content anchoring").

The column `outside` of a manifest names frames of the whole video by kind: global, front, back, left, right and the
eight expressions (section 7.1); those within the clip stay among them, and are marked (`Sample.inside`). Where a row
names no global frames, some are drawn from all of the video, in the clip and out of it. Every anchor is encoded alone,
views and expressions in sizes of their own (`GloriaSettings.anchor_area`), global ones in that of the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from talkingdit.data.clips import Frames, read_frames, times
from talkingdit.data.cutting import Cut, Item
from talkingdit.data.encoders import Encoders
from talkingdit.data.encoding import ClipReader, clip_reader
from talkingdit.data.sample import Sample
from talkingdit.families.gloria.anchors import GLOBAL
from talkingdit.families.gloria.checkpoint import read_settings
from talkingdit.families.gloria.outline import LEAST
from talkingdit.families.wan_i2v.clips import WanI2VEncoders, encoded
from talkingdit.media.files import read_image
from talkingdit.media.framing import fit_image, output_size
from talkingdit.media.kinds import IMAGES

DRAWN = 3  # global frames of a video whose row names none


class GloriaEncoders(WanI2VEncoders):
    """Autoencoder, UMT5, picture encoder and wav2vec 2.0 of a Gloria checkpoint."""

    OFFERS: ClassVar[tuple[str, ...]] = ("latents", "text", "audio")
    hears: ClassVar[bool] = True

    def read_settings(self) -> Any:
        return read_settings(self.folder)


encoders = GloriaEncoders  # see `talkingdit.data.encoding.Clips`


def encode_clip(
    item: Item, cut: Cut, size: tuple[int, int], encoders: Encoders, rng: np.random.Generator, source: str = ""
) -> Sample:
    """See `talkingdit.data.encoding.EncodeClip`."""
    with clip_reader(item, cut, size, encoders, rng) as reader:
        sample = encoded(reader, source)
        named: dict[str, Sequence[Path | float]] = dict(item.entry.outside)
        if GLOBAL not in named and not item.entry.is_image:
            fps = encoders.settings.fps
            named[GLOBAL] = [item.entry.start + int(frame) / fps for frame in rng.integers(item.frames, size=DRAWN)]
        for kind, frames in named.items():
            sample.outside[kind] = _anchors(reader, kind, frames)
            sample.inside[kind] = torch.tensor([float(_is_inside(reader, frame)) for frame in frames])
        return sample


def _is_inside(reader: ClipReader, frame: Path | float) -> bool:
    """Is a frame of the video within the clip?"""
    if isinstance(frame, Path):
        return False
    shown, fps = reader.times(), reader.encoders.settings.fps
    return shown[0] - Fraction(1, 2 * fps) <= Fraction(frame) <= shown[-1] + Fraction(1, 2 * fps)


def _anchors(reader: ClipReader, kind: str, frames: Sequence[Path | float]) -> Tensor:
    """Latents [C, n, h, w] of the frames of a kind; those of a kind have the size of the first one."""
    images = [_image(reader, frame) for frame in frames]
    size = reader.size
    if kind != GLOBAL:
        settings: Any = reader.encoders.settings
        area = settings.anchor_area
        size = output_size(images[0].shape[0], images[0].shape[1], area, LEAST)
    return reader.encoders.stills(np.stack([fit_image(image, size, cover=True)[0] for image in images]))


def _image(reader: ClipReader, frame: Path | float) -> Frames:
    """[H, W, 3] of an image file, or of the video at some second."""
    if isinstance(frame, Path) and frame.suffix.lower() in IMAGES:
        return read_image(frame)
    if isinstance(frame, Path):
        return next(read_frames(frame, [Fraction(0)]))
    return next(read_frames(reader.item.entry.video, times(frame, 0, 1, 1)))
