# SPDX-License-Identifier: Apache-2.0
"""Which parts of a video become training clips, and how large their frames are."""

from __future__ import annotations

from dataclasses import dataclass

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.data.manifest import Entry
from talkingdit.data.probe import Media, Probes, frames_of, media_of
from talkingdit.data.sample import BrokenSample
from talkingdit.errors import UserError
from talkingdit.media.framing import output_size

OPENINGS = ("first", "all", "none")


@dataclass(frozen=True)
class Item:
    """An entry of a manifest whose files are known.

    Args:
        entry: of the manifest.
        video: what its video file is.
        frames: how many it has at the rate asked for.
    """

    entry: Entry
    video: Media
    frames: int


@dataclass(frozen=True)
class Cut:
    """A clip of an item: frames `start` .. `start + frames - 1`.

    Args:
        history: those before it are its history.
        still: it starts from the reference image. With neither, it is a beginning.
    """

    start: int
    frames: int
    history: bool = False
    still: bool = False

    @property
    def latents(self) -> int:
        return max(1, self.frames // FRAMES_PER_LATENT)

    def key(self, entry: Entry) -> str:
        """Name of the clip, unique in the data set."""
        return f"{entry.key}-{self.start:06d}{'h' if self.history else 's' if self.still else 'b'}"


@dataclass(frozen=True)
class Cutting:
    """Which clips are cut from a video, and how large.

    Args:
        clip_frames: frames of a clip, a multiple of 4.
        min_frames: the end of a video, or a short video, makes a clip if it has so many frames; a multiple of 4.
        stride: frames from the beginning of a clip to that of the next; 0: `clip_frames`.
        openings: clips without history: "first" one where the video begins, "all" one at every stride, or "none". For
            models that know no history "first" means "all".
        stills: with every clip without history one that starts from the reference.
        max_area: most pixels of a frame.
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
        """The clips of an item, in the order of their beginnings.

        Args:
            motion_frames: of history that the model sees; 0 for none.
        """
        if item.entry.is_image:
            return [Cut(0, 1)]
        stride = self.stride or self.clip_frames
        everywhere = range(0, item.frames, stride)
        openings = "all" if self.openings == "first" and not motion_frames else self.openings
        found = []
        for start in {"first": [0], "all": everywhere, "none": []}[openings]:
            count = self._fitting(item.frames - start)
            found += [Cut(start, count)] + ([Cut(start, count, still=True)] if self.stills else [])
        if motion_frames:
            for start in range(motion_frames, item.frames, stride):
                found.append(Cut(start, self._fitting(item.frames - start), history=True))
        return sorted((cut for cut in found if cut.frames), key=lambda cut: (cut.start, cut.history, cut.still))

    def _fitting(self, frames: int) -> int:
        count = min(self.clip_frames, frames // FRAMES_PER_LATENT * FRAMES_PER_LATENT)
        return count if count >= self.min_frames else 0

    def size(self, item: Item) -> tuple[int, int]:
        """Height and width of its frames.

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
    return Item(entry, video, frames_of(entry, video, sound, fps))
