# SPDX-License-Identifier: Apache-2.0
"""The frozen networks that turn frames, words and voices into what a transformer sees.

A family says in its clips.py which files they are and how they load: a subclass of `CheckpointEncoders`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from talkingdit.autoencoders.streaming import encode, to_video
from talkingdit.data.manifest import Entry
from talkingdit.data.probe import Media
from talkingdit.encoders.speech import SpeechEncoder
from talkingdit.encoders.text import TextEncoder
from talkingdit.errors import UserError
from talkingdit.media.sound import SPEECH_RATE, read_audio

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

WHAT = ("latents", "text", "audio")

# A speech encoder attends to the whole recording, so a long one is encoded in parts that overlap.
PART_SECONDS = 60
MARGIN_SECONDS = 10
CACHED_PARTS = 2  # 130 MB each at the size of the released encoder
CACHED_TEXTS = 256
END = 1 << 20  # bytes of either end of a file that tell it from others

T = TypeVar("T")


class ClipSettings(Protocol):
    """What the clips of a checkpoint depend on; the settings of a family may say more."""

    @property
    def fps(self) -> int:
        """Frames per second."""

    @property
    def motion_frames(self) -> int:
        """Frames of history that the model sees; 0 where it knows none."""

    @property
    def size_multiple(self) -> int:
        """Height and width are multiples of this many pixels, itself a multiple of 16."""


@dataclasses.dataclass(frozen=True)
class PlainSettings:
    """`ClipSettings` for a family that has no settings like them."""

    fps: int
    motion_frames: int = 0
    size_multiple: int = 16


class _Cache:
    """The values that were used last."""

    def __init__(self, size: int):
        self.size = size
        self.values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self.values:
            self.values[key] = make()
        self.values.move_to_end(key)
        if len(self.values) > self.size:
            self.values.popitem(last=False)
        return self.values[key]


class Encoders:
    """Encoders in memory. Results are float32 on the CPU; the autoencoder runs in the precision that it has.

    Args:
        vae: the autoencoder.
        settings: of the checkpoint.
        text: None leaves captions as they are.
        audio: None leaves sound out.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        settings: ClipSettings,
        text: TextEncoder | None = None,
        audio: SpeechEncoder | None = None,
    ):
        self.vae = vae
        self.settings = settings
        self.text_encoder = text
        self.audio_encoder = audio
        self._texts = _Cache(CACHED_TEXTS)
        self._parts = _Cache(CACHED_PARTS)

    @property
    def has_audio(self) -> bool:
        return self.audio_encoder is not None

    def latents(self, video: Tensor | np.ndarray) -> Tensor:
        """Frames uint8 [1 + 4 n, H, W, 3], or [1, 3, 1 + 4 n, H, W] in -1..1, to latents [C, 1 + n, H / 8, W / 8]."""
        pixels = to_video(video) if isinstance(video, np.ndarray) else video
        return encode(self.vae, pixels.to(self.vae.device))[0].cpu()

    def stills(self, images: np.ndarray) -> Tensor:
        """Images uint8 [n, H, W, 3], each encoded alone, to latents [C, n, H / 8, W / 8]."""
        return torch.cat([self.latents(image[None]) for image in images], dim=1)

    def text(self, caption: str) -> Tensor | None:
        """Features [L, text_dim] of a caption, without padding; None without a text encoder."""
        encoder = self.text_encoder
        if encoder is None:
            return None

        @torch.no_grad()
        def make() -> Tensor:
            found = encoder.encode([caption])
            return found.features[0, found.mask[0]].float().cpu()

        return self._texts.get(caption, make)

    def speech(self, entry: Entry, video: Media, frames: int, first: int, count: int) -> Tensor:
        """Features [layers, dim, count] of frames `first` .. `first + count - 1` of an entry.

        The encoder is given the whole voice of the entry, as in generation; of one longer than 80 s the minute that a
        frame is in, and ten seconds before and behind.

        Args:
            entry: of the manifest.
            video: what its video file is.
            frames: how many the entry has.
            first, count: which are wanted.

        Raises:
            UserError: the sound cannot be read.
        """
        part, margin = PART_SECONDS * self.settings.fps, MARGIN_SECONDS * self.settings.fps
        whole = frames <= part + 2 * margin
        found = []
        at = first
        while at < first + count:
            number = 0 if whole else at // part
            begin, end = (0, frames) if whole else (number * part, min(frames, (number + 1) * part))
            given = (begin, end) if whole else (max(0, begin - margin), min(frames, end + margin))
            features = self._parts.get((entry.key, given), partial(self._encode_speech, entry, video, *given))
            stop = min(end, first + count)
            found.append(features[..., at - given[0] : stop - given[0]])
            at = stop
        return torch.cat(found, dim=2)

    def _encode_speech(self, entry: Entry, video: Media, begin: int, end: int) -> Tensor:
        """Features of frames `begin` .. `end - 1`, from their sound alone."""
        assert self.audio_encoder is not None
        # Times of an entry count from the first frame; its sound may begin earlier.
        source, origin = (entry.video, video.begins) if entry.audio is None else (entry.audio, 0.0)
        fps = self.settings.fps
        waveform = read_audio(source, SPEECH_RATE, origin + entry.start + begin / fps, (end - begin) / fps)
        return self.audio_encoder.features(waveform, end - begin).float().cpu()


@dataclasses.dataclass(frozen=True)
class CheckpointEncoders:
    """The encoders of a checkpoint folder, loaded when they are first needed, in every process anew.

    A family's subclass, which must have a name in its module to reach worker processes, fills in three methods:
    `read_settings`, `files` and `load`, and says in `OFFERS` what it has.

    Args:
        folder: a checkpoint; its transformer is not loaded and need not be there.
        what: of `OFFERS`, "latents" among it; text and speech encoder are loaded where they are named. Default: all.
        dtype: of the text encoder.
        device: where they run.
        fps: frames per second, where others than those of the checkpoint are wanted.

    Raises:
        UserError: something else is asked for.
    """

    OFFERS: ClassVar[tuple[str, ...]] = WHAT

    folder: Path
    what: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    fps: int | None = None

    def __post_init__(self) -> None:
        what = self.what or self.OFFERS
        if "latents" not in what or any(name not in self.OFFERS for name in what):
            rest = " or ".join(self.OFFERS[1:])
            expected = f"latents, and {rest} beside them" if rest else "latents"
            raise UserError(f"what: expected {expected}, got {','.join(what)!r}.")
        object.__setattr__(self, "what", tuple(what))

    def read_settings(self) -> Any:
        """How the checkpoint is used: `ClipSettings`, a dataclass.

        Raises:
            UserError: the checkpoint says something impossible.
        """
        raise NotImplementedError

    def files(self) -> Sequence[Path]:
        """Files and folders of the encoders in `what`, always in the same order.

        Raises:
            UserError: one is missing.
        """
        raise NotImplementedError

    def load(self) -> Encoders:
        """The encoders in `what`, on the device.

        Raises:
            UserError: a part is missing or does not load.
        """
        raise NotImplementedError

    @cached_property
    def settings(self) -> Any:
        """How the checkpoint is used, at the rate asked for; raises as `read_settings`."""
        found = self.read_settings()
        return found if self.fps is None else dataclasses.replace(found, fps=self.fps)

    @cached_property
    def loaded(self) -> Encoders:
        """The encoders, in this process; raises as `load`."""
        return self.load()

    @cached_property
    def fingerprint(self) -> str:
        """Changes where one of the encoders does; the same for a copy of the folder. Raises as `files`."""
        digest = hashlib.sha256()
        for part in self.files():
            for file in sorted(path for path in (part.rglob("*") if part.is_dir() else [part]) if path.is_file()):
                size = file.stat().st_size
                digest.update(f"{file.name} {size} ".encode())
                with file.open("rb") as stream:  # weights are gigabytes; two ends of them tell trained ones apart
                    digest.update(stream.read(END))
                    stream.seek(max(0, size - END))
                    digest.update(stream.read())
        return digest.hexdigest()[:32]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
