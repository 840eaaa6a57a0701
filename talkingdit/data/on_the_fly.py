# SPDX-License-Identifier: Apache-2.0
"""A source that reads and encodes videos when they are asked for: nothing to prepare, but encoded every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT, PIXELS_PER_LATENT, latent_size
from talkingdit.data.cutting import Cut, Cutting, Item, open_item
from talkingdit.data.encoders import CheckpointEncoders, Encoders
from talkingdit.data.encoding import EncodeClip, broken_by
from talkingdit.data.manifest import Manifest, read_manifest
from talkingdit.data.probe import Probes
from talkingdit.data.sample import BrokenSample, ClipRequest, Sample, Shape
from talkingdit.errors import UserError


class OnTheFly:
    """Clips of the videos of a manifest. Items are videos; which part of one is taken is drawn anew every time.

    Videos that cannot be used at all are left out when the source is made; `broken` says which and why.

    Args:
        manifest: path, or what `read_manifest` gave.
        encoders: in memory, or of a checkpoint folder (its family's `clips.encoders`): these are loaded where they are
            needed, in every worker process.
        encode: the same family's `clips.encode_clip`.
        cutting: length and size of the clips, where requests do not say; its stride means nothing here.
        name: of the source; default: that of the manifest.
        openings: share of clips without history where requests do not say and a video has room for both. With
            `Cutting.stills` half of them start from the reference.

    Raises:
        UserError: the manifest is wrong, or none of its videos can be used.
        ValueError: openings is not in 0..1.
    """

    def __init__(
        self,
        manifest: str | Path | Manifest,
        encoders: Encoders | CheckpointEncoders,
        encode: EncodeClip,
        cutting: Cutting | None = None,
        name: str | None = None,
        openings: float = 0.25,
    ):
        if not 0 <= openings <= 1:
            raise ValueError(f"OnTheFly: openings must be within 0..1, got {openings}")
        self.manifest = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
        self.name = name or self.manifest.path.stem
        self._encoders, self._encode = encoders, encode
        self.cutting = Cutting() if cutting is None else cutting
        self.openings = openings
        self.broken: list[BrokenSample] = []
        self.items: list[Item] = []
        self.sizes: list[tuple[int, int]] = []
        self._open()

    @property
    def encoders(self) -> Encoders:
        return self._encoders if isinstance(self._encoders, Encoders) else self._encoders.loaded

    @property
    def empty_text(self) -> Tensor | None:
        """Features [L, text_dim] of the empty caption; None where captions are not encoded."""
        return self.encoders.text("")

    def _open(self) -> None:
        settings = self._encoders.settings
        probes = Probes(self.manifest.path)
        probes.fill(self.manifest.entries)
        for entry in self.manifest.entries:
            try:
                with broken_by(entry.key, entry.video):
                    item = open_item(entry, probes, settings.fps)
                    size = self.cutting.size(item)
                least = 1 if entry.is_image else self.cutting.min_frames
                if item.frames < least:
                    raise BrokenSample(
                        entry.key, f"{entry.video} has {item.frames} frames, at least {least} are needed."
                    )
            except BrokenSample as error:
                self.broken.append(error)
            else:
                self.items.append(item)
                self.sizes.append(size)
        if not self.items:
            raise UserError(f"{self.manifest.path}: none of its videos can be used; the first one: {self.broken[0]}")

    def __len__(self) -> int:
        return len(self.items)

    def group(self, index: int) -> str:
        """Name of the row of the manifest that video `index` is."""
        return self.items[index].entry.key

    def shape(self, index: int) -> Shape:
        """What video `index` offers."""
        item, motion = self.items[index], self._encoders.settings.motion_frames
        height, width = latent_size(self.sizes[index])
        fps, kind, history = float(self._encoders.settings.fps), item.entry.kind, 0
        frames = min(self.cutting.clip_frames, item.frames) // FRAMES_PER_LATENT
        if item.entry.is_image:
            frames = 1
        elif motion and item.frames - motion >= self.cutting.min_frames:
            history = -(-motion // FRAMES_PER_LATENT)
        return Shape(frames, height, width, fps, history, kind=kind, resizable=True)

    def sample(self, index: int, rng: np.random.Generator, clip: ClipRequest) -> Sample:
        """A clip of video `index`.

        Raises:
            BrokenSample: a file cannot be read.
            ValueError: more frames are asked for than there are.
        """
        item, shape = self.items[index], self.shape(index)
        frames = shape.frames if clip.frames is None else clip.frames
        if frames > shape.frames:
            raise ValueError(f"{self.name}: {item.entry.key} has {shape.frames} latent frames, asked for {frames}")
        size = (PIXELS_PER_LATENT * (clip.height or shape.height), PIXELS_PER_LATENT * (clip.width or shape.width))
        return self._encode(item, self._cut(item, frames, clip.history, rng), size, self.encoders, rng, self.name)

    def _cut(self, item: Item, latents: int, history: bool | None, rng: np.random.Generator) -> Cut:
        if item.entry.is_image:
            return Cut(0, 1)
        frames, motion = latents * FRAMES_PER_LATENT, self._encoders.settings.motion_frames
        wanted = rng.random() >= self.openings if history is None else history
        behind = wanted and motion > 0 and item.frames - motion >= frames
        first = motion if behind else 0
        start = int(rng.integers(first, item.frames - frames + 1))
        still = history is None and not behind and self.cutting.stills and rng.random() < 0.5
        return Cut(start, frames, behind, still)
