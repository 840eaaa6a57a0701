# SPDX-License-Identifier: Apache-2.0
"""From a part of a video to a sample: what clips of all families have in common.

`encode_clip` is all of it for models without history. A family that knows more kinds of clips has an `encode_clip` of
its own in clips.py, made of the parts here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from talkingdit.autoencoders.streaming import to_video
from talkingdit.data.clips import Frames, read_clip, read_mask, times
from talkingdit.data.cutting import Cut, Item
from talkingdit.data.encoders import CheckpointEncoders, Encoders
from talkingdit.data.sample import BrokenSample, Sample
from talkingdit.errors import UserError


class EncodeClip(Protocol):
    """How a family encodes a clip: a function that has a name in its module, to reach worker processes."""

    def __call__(
        self,
        item: Item,
        cut: Cut,
        size: tuple[int, int],
        encoders: Encoders,
        rng: np.random.Generator,
        source: str = "",
    ) -> Sample:
        """Read and encode a clip.

        Args:
            item: from `open_item`.
            cut: which part.
            size: height and width of the frames, multiples of 16.
            encoders: of the checkpoint.
            rng: draws what is left open: the reference image, out of all of the item, where neither the manifest nor
                the kind of the clip says which.
            source: name of the source.

        Raises:
            BrokenSample: a file cannot be read.
        """


class Clips(Protocol):
    """clips.py: how the frozen networks of a checkpoint make a part of a video into a training clip."""

    def encoders(
        self,
        folder: Path,
        what: tuple[str, ...] = (),
        dtype: torch.dtype = ...,
        device: str = "cpu",
        fps: int | None = None,
    ) -> CheckpointEncoders:
        """The encoders of a checkpoint, not loaded yet; arguments as `CheckpointEncoders` has them."""

    @property
    def encode_clip(self) -> EncodeClip:
        """Reads and encodes a clip; `encode_clip` of this file does for models without history."""


@dataclass(frozen=True)
class ClipReader:
    """Reads and encodes the files of a clip.

    Args:
        item, cut, size, encoders: as for `EncodeClip`.
        drawn: the frame of the item that is the reference where nothing else says which.
    """

    item: Item
    cut: Cut
    size: tuple[int, int]
    encoders: Encoders
    drawn: int

    def times(self, past: int = 0) -> list[Fraction]:
        """When the frames of the clip are shown, with `past` more before it, in seconds of the file."""
        fps = self.encoders.settings.fps
        return times(self.item.entry.start, self.cut.start - past, past + self.cut.frames, fps)

    def frames(self, past: int = 0) -> Frames:
        """Frames of the clip, with `past` more before it: uint8 [past + n, *size, 3].

        Raises:
            UserError: the item has too few, or the file cannot be read.
        """
        entry, cut = self.item.entry, self.cut
        if cut.start < past or cut.start + cut.frames > self.item.frames:
            raise UserError(
                f"{entry.video} has {self.item.frames} frames, too few for {cut.frames} from frame {cut.start} on."
            )
        return read_clip(entry.video, self.times(past), self.size)

    def reference(self) -> Frames:
        """The reference image, uint8 [1, *size, 3]: of the manifest, or the frame drawn; of a clip that starts from it
        the frame before the clip; of an image this image.

        Raises:
            UserError: the file cannot be read.
        """
        entry, fps = self.item.entry, self.encoders.settings.fps
        if self.cut.still:
            return read_clip(entry.video, times(entry.start, max(self.cut.start - 1, 0), 1, fps), self.size)
        if entry.reference is not None:
            return read_clip(entry.reference, self.times()[:1], self.size)
        drawn = 0 if entry.is_image else self.drawn
        return read_clip(entry.video, times(entry.start, drawn, 1, fps), self.size)

    def speech(self, past: int = 0) -> Tensor | None:
        """Features [layers, dim, past + n] of the frames of the clip and of `past` before it; None without sound."""
        entry, cut = self.item.entry, self.cut
        if not self.encoders.has_audio or entry.silent:
            return None
        return self.encoders.speech(entry, self.item.video, self.item.frames, cut.start - past, past + cut.frames)

    def sample(self, source: str, latents: Tensor, **more: Any) -> Sample:
        """The sample: its caption, regions and frames from outside, and what is given of the rest.

        Args:
            source: name of the source.
            latents: [C, T, H, W] of the clip.
            more: other fields of `Sample`.
        """
        entry, clip = self.item.entry, self.times()
        shape = (self.item.video.height, self.item.video.width)
        return Sample(
            key=self.cut.key(entry),
            source=source,
            latents=latents,
            caption=entry.caption,
            text=self.encoders.text(entry.caption),
            regions={name: read_mask(region, clip, self.size, shape) for name, region in entry.regions.items()},
            outside={kind: self.encoders.stills(self._outside(frames)) for kind, frames in entry.outside.items()},
            kind=entry.kind,
            **more,
        )

    def _outside(self, frames: Sequence[Path | float]) -> Frames:
        """Images [n, *size, 3] of files, or of the video at some seconds."""
        found = []
        for frame in frames:
            if isinstance(frame, Path):
                found.append(read_clip(frame, [Fraction(0)], self.size))
            else:
                found.append(read_clip(self.item.entry.video, times(frame, 0, 1, 1), self.size))
        return np.concatenate(found)


@contextmanager
def clip_reader(
    item: Item, cut: Cut, size: tuple[int, int], encoders: Encoders, rng: np.random.Generator
) -> Iterator[ClipReader]:
    """A reader of a clip; what is wrong with a file in the block makes the sample a broken one.

    Raises:
        BrokenSample: a file cannot be read.
    """
    with broken_by(cut.key(item.entry), item.entry.video):
        yield ClipReader(item, cut, size, encoders, int(rng.integers(item.frames)))


@contextmanager
def broken_by(key: str, file: Path) -> Iterator[None]:
    """Whatever goes wrong with a file in the block makes the sample of this key a broken one.

    Nobody can list what decoders raise for a damaged file; one of them must not end the work on all others. What is
    not the file's fault goes through: a device without memory or in an unusable state.

    Raises:
        BrokenSample: of an error that is one sentence already this one, of any other its type and what it says.
    """
    try:
        yield
    except (BrokenSample, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except UserError as error:
        raise BrokenSample(key, str(error)) from error
    except Exception as error:
        said = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
        raise BrokenSample(key, f"{file} cannot be decoded ({reason}).") from error


def encode_clip(
    item: Item, cut: Cut, size: tuple[int, int], encoders: Encoders, rng: np.random.Generator, source: str = ""
) -> Sample:
    """See `EncodeClip`. Clips without history: the autoencoder sees the reference image before the n frames of the
    clip, and of its 1 + n / 4 latents the first is that of the reference alone."""
    with clip_reader(item, cut, size, encoders, rng) as reader:
        frames, image = reader.frames(), reader.reference()
        if item.entry.is_image:
            latents = encoders.latents(frames)
        else:
            latents = encoders.latents(torch.cat([to_video(image), to_video(frames)], dim=2))[:, 1:]
        return reader.sample(source, latents, reference=encoders.latents(image), audio=reader.speech())
