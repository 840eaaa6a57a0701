# SPDX-License-Identifier: Apache-2.0
"""A part of a video as the model is to learn it: exactly what generation would give it for the same pictures.

Wan-S2V generates clip by clip (see `pipeline.py`), and the autoencoder is causal: what latents hold
depends on the pictures before them. So there are three kinds of clips.

    with history    The 73 pictures before the clip and its n pictures are encoded together: 19 + n / 4 latents. The
                    first 19 are what encoding the 73 pictures alone gives, which is the history that generation packs;
                    the others are the clip, which generation decodes behind them.
    beginning       The reference picture and the n pictures of the clip are encoded together: 1 + n / 4 latents. The
                    first one is that of the reference alone; generation decodes its first clip behind it.
    start           Where generation is told to start from the reference picture, its history is grey and ends with six
                    times this picture. So it is here; the reference is then the picture before the clip.

Picture p of an entry belongs to column p of the speech features, always. The reference is always encoded alone, and a
pose video with its first picture twice, as in generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from talkingdit.autoencoders.streaming import FRAMES_PER_LATENT, to_video
from talkingdit.data.clips import CELL, Frames, read_frames, read_mask, read_pictures, times
from talkingdit.data.encoders import Encoders
from talkingdit.data.manifest import Entry
from talkingdit.data.probe import Media, Probes, media_of, pictures_of
from talkingdit.data.sample import BrokenSample, Sample
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.audio import LOOK_BACK
from talkingdit.families.wan_s2v.pipeline import STARTING_FRAMES
from talkingdit.media.framing import fit_pose, output_size

OPENINGS = ("first", "all", "none")


@dataclass(frozen=True)
class Item:
    """An entry of a manifest whose files are known.

    Args:
        entry: of the manifest.
        video: what its video file is.
        pictures: how many it has at the rate asked for.
    """

    entry: Entry
    video: Media
    pictures: int


@dataclass(frozen=True)
class Cut:
    """A clip of an item: pictures `start` .. `start + pictures - 1`.

    Args:
        history: those before it are its history.
        still: it starts from the reference picture. With neither, it is a beginning.
    """

    start: int
    pictures: int
    history: bool = False
    still: bool = False

    @property
    def latents(self) -> int:
        return max(1, self.pictures // FRAMES_PER_LATENT)

    def key(self, entry: Entry) -> str:
        """Name of the clip, unique in the data set."""
        return f"{entry.key}-{self.start:06d}{'h' if self.history else 's' if self.still else 'b'}"


@dataclass(frozen=True)
class Cutting:
    """Which clips are cut from a video, and how large.

    Args:
        clip_frames: pictures of a clip, a multiple of 4.
        min_frames: the end of a video, or a short video, makes a clip if it has so many pictures; a multiple of 4.
        stride: pictures from the beginning of a clip to that of the next; 0: `clip_frames`.
        openings: clips without history: "first" one where the video begins, "all" one at every stride, or "none".
        stills: with every clip without history one that starts from the reference.
        max_area: most pixels of a picture.
        multiple: of which sides are multiples.

    Raises:
        ValueError: a value is impossible.
    """

    clip_frames: int = 80
    min_frames: int = 40
    stride: int = 0
    openings: str = "first"
    stills: bool = False
    max_area: int = 448 * 832
    multiple: int = 64

    def __post_init__(self) -> None:
        for name in ("clip_frames", "min_frames"):
            value = getattr(self, name)
            if value < FRAMES_PER_LATENT or value % FRAMES_PER_LATENT:
                raise ValueError(f"{name} must be a multiple of 4, at least 4, got {value}")
        if self.min_frames > self.clip_frames:
            raise ValueError(f"min_frames must be at most clip_frames ({self.clip_frames}), got {self.min_frames}")
        if self.stride < 0:
            raise ValueError(f"stride must be at least 0, got {self.stride}")
        if self.openings not in OPENINGS:
            raise ValueError(f"openings must be one of {', '.join(OPENINGS)}, got {self.openings!r}")
        if self.multiple < 16 or self.multiple % 16:
            raise ValueError(f"multiple must be a multiple of 16, got {self.multiple}")

    def cuts(self, item: Item, motion_frames: int) -> list[Cut]:
        """The clips of an item, in the order of their beginnings."""
        if item.entry.is_picture:
            return [Cut(0, 1)]
        stride = self.stride or self.clip_frames
        found = []
        beginnings = {"first": [0], "all": range(0, item.pictures, stride), "none": []}[self.openings]
        for start in beginnings:
            count = self._fitting(item.pictures - start)
            found += [Cut(start, count)] + ([Cut(start, count, still=True)] if self.stills else [])
        for start in range(motion_frames, item.pictures, stride):
            found.append(Cut(start, self._fitting(item.pictures - start), history=True))
        return sorted((cut for cut in found if cut.pictures), key=lambda cut: (cut.start, cut.history, cut.still))

    def _fitting(self, pictures: int) -> int:
        count = min(self.clip_frames, pictures // FRAMES_PER_LATENT * FRAMES_PER_LATENT)
        return count if count >= self.min_frames else 0

    def size(self, item: Item) -> tuple[int, int]:
        """Height and width of its pictures.

        Raises:
            UserError: no size fits.
        """
        return output_size(item.video.height, item.video.width, self.max_area, self.multiple)


def open_item(entry: Entry, probes: Probes, fps: int) -> Item:
    """An entry with what its files are.

    Raises:
        BrokenSample: they cannot be used.
    """
    try:
        video, sound = media_of(entry, probes)
    except UserError as error:
        raise BrokenSample(entry.key, str(error)) from error
    return Item(entry, video, pictures_of(entry, video, sound, fps))


def encode_clip(
    item: Item, cut: Cut, size: tuple[int, int], encoders: Encoders, rng: np.random.Generator, source: str = ""
) -> Sample:
    """Read and encode a clip.

    Args:
        item: from `open_item`.
        cut: which part.
        size: height and width of the pictures, multiples of 16.
        encoders: of the checkpoint.
        rng: draws the reference picture, out of all of the item, where neither the manifest nor the kind of the clip
            says which.
        source: name of the source.

    Raises:
        BrokenSample: a file cannot be read.
    """
    try:
        return _encode(item, cut, size, encoders, rng, source)
    except UserError as error:
        raise BrokenSample(cut.key(item.entry), str(error)) from error


def _encode(
    item: Item, cut: Cut, size: tuple[int, int], encoders: Encoders, rng: np.random.Generator, source: str
) -> Sample:
    entry, fps, motion = item.entry, encoders.settings.fps, encoders.settings.motion_frames
    drawn = int(rng.integers(item.pictures))
    past = motion if cut.history else 0
    if cut.start < past or cut.start + cut.pictures > item.pictures:
        raise UserError(
            f"{entry.video} has {item.pictures} pictures, too few for {cut.pictures} from picture {cut.start} on."
        )
    shown = times(entry.start, cut.start - past, past + cut.pictures, fps)
    pictures = read_pictures(entry.video, shown, size)
    if cut.still:
        portrait = read_pictures(entry.video, times(entry.start, max(cut.start - 1, 0), 1, fps), size)
    elif entry.reference is not None:
        portrait = read_pictures(entry.reference, shown[:1], size)
    elif entry.is_picture:
        portrait = pictures
    else:
        portrait = read_pictures(entry.video, times(entry.start, drawn, 1, fps), size)

    reference = encoders.latents(portrait)
    history: Tensor | None = None
    if entry.is_picture:
        latents = encoders.latents(pictures)
    else:
        before = to_video(portrait)
        if cut.still:
            grey = before.new_zeros(1, 3, motion - STARTING_FRAMES, *size)
            before = torch.cat([grey, before.expand(-1, -1, STARTING_FRAMES, -1, -1)], dim=2)
        video = to_video(pictures)
        together = encoders.latents(video if cut.history else torch.cat([before, video], dim=2))
        count = together.shape[1] - cut.latents
        latents = together[:, count:]
        history = together[:, :count] if cut.history or cut.still else None

    audio = audio_history = None
    if encoders.has_audio and not entry.silent:
        heard = min(LOOK_BACK, cut.start) if cut.history else 0
        columns = encoders.speech(entry, item.video, item.pictures, cut.start - heard, heard + cut.pictures)
        audio, audio_history = columns[..., heard:], columns[..., :heard] if heard else None
    clip = shown[past:]
    box = (item.video.height, item.video.width)
    return Sample(
        key=cut.key(entry),
        source=source,
        latents=latents,
        audio=audio,
        caption=entry.caption,
        text=encoders.text(entry.caption),
        reference=reference,
        history=history,
        audio_history=audio_history,
        pose=None if entry.pose is None else _pose(entry.pose, clip, size, encoders),
        regions={name: read_mask(region, clip, size, box) for name, region in entry.regions.items()},
        outside={kind: encoders.stills(_frames(entry.video, frames, size)) for kind, frames in entry.outside.items()},
        kind=entry.kind,
    )


def _pose(path: Path, shown: Sequence[Fraction], size: tuple[int, int], encoders: Encoders) -> Tensor:
    """Latents [C, T, H, W] of a pose video at the times of a clip."""
    video = torch.stack([fit_pose(frame, size) for frame in read_frames(path, shown)], dim=1)[None]
    return encoders.latents(torch.cat([video[:, :, :1], video], dim=2))[:, 1:]


def _frames(video: Path, frames: Sequence[Path | float], size: tuple[int, int]) -> Frames:
    """Pictures [n, *size, 3] of files, or of the video at some seconds."""
    found = []
    for frame in frames:
        if isinstance(frame, Path):
            found.append(read_pictures(frame, [Fraction(0)], size))
        else:
            found.append(read_pictures(video, times(frame, 0, 1, 1), size))
    return np.concatenate(found)


def cells(size: tuple[int, int]) -> tuple[int, int]:
    """Latent rows and columns of pictures of a size."""
    return size[0] // CELL, size[1] // CELL
