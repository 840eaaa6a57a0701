# SPDX-License-Identifier: Apache-2.0
"""The frozen networks that turn pictures, words and voices into what a Wan-S2V transformer sees."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from talkingdit.autoencoders.streaming import encode, to_video
from talkingdit.data.manifest import Entry
from talkingdit.data.probe import Media
from talkingdit.encoders.text import TextEncoder
from talkingdit.errors import UserError
from talkingdit.media.files import SPEECH_RATE, read_audio

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from talkingdit.families.wan_s2v.checkpoint import WanS2VSettings

WHAT = ("latents", "text", "audio")

# The speech encoder attends to all it hears, so a long voice is encoded in parts that overlap.
PART_SECONDS = 60
MARGIN_SECONDS = 10
CACHED_PARTS = 2  # 130 MB each at the size of the released encoder
CACHED_TEXTS = 256

T = TypeVar("T")


class SpeechFeaturesOf(Protocol):
    """What is asked of a speech encoder, such as `talkingdit.encoders.wav2vec.SpeechEncoder`."""

    def features(self, waveform: np.ndarray | Tensor, frames: int) -> Tensor:
        """[layers, dim, frames] for a waveform at 16 kHz."""


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
        settings: of the checkpoint: pictures per second, pictures of history.
        text: None leaves captions as they are.
        audio: None leaves sound out.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        settings: WanS2VSettings,
        text: TextEncoder | None = None,
        audio: SpeechFeaturesOf | None = None,
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
        """Pictures uint8 [1 + 4 n, H, W, 3], or [1, 3, 1 + 4 n, H, W] in -1..1, to latents [C, 1 + n, H / 8, W / 8]."""
        pixels = to_video(video) if isinstance(video, np.ndarray) else video
        return encode(self.vae, pixels.to(self.vae.device))[0].cpu()

    def stills(self, pictures: np.ndarray) -> Tensor:
        """Pictures uint8 [n, H, W, 3], each encoded alone, to latents [C, n, H / 8, W / 8]."""
        return torch.cat([self.latents(picture[None]) for picture in pictures], dim=1)

    def text(self, caption: str) -> Tensor | None:
        """Features [L, text_dim] of a caption, without padding."""
        encoder = self.text_encoder
        if encoder is None:
            return None

        @torch.no_grad()
        def make() -> Tensor:
            found = encoder.encode([caption])
            return found.features[0, found.mask[0]].float().cpu()

        return self._texts.get(caption, make)

    def speech(self, entry: Entry, video: Media, pictures: int, first: int, count: int) -> Tensor:
        """Features [layers, dim, count] of pictures `first` .. `first + count - 1` of an entry.

        The encoder hears the whole voice of the entry, as in generation; of one longer than 80 s the minute that a
        picture is in, and ten seconds before and behind.

        Args:
            entry: of the manifest.
            video: what its video file is.
            pictures: how many the entry has.
            first, count: which are wanted.

        Raises:
            UserError: the sound cannot be read.
        """
        part, margin = PART_SECONDS * self.settings.fps, MARGIN_SECONDS * self.settings.fps
        whole = pictures <= part + 2 * margin
        found = []
        at = first
        while at < first + count:
            number = 0 if whole else at // part
            begin, end = (0, pictures) if whole else (number * part, min(pictures, (number + 1) * part))
            heard = (begin, end) if whole else (max(0, begin - margin), min(pictures, end + margin))
            features = self._parts.get((entry.key, heard), partial(self._hear, entry, video, *heard))
            stop = min(end, first + count)
            found.append(features[..., at - heard[0] : stop - heard[0]])
            at = stop
        return torch.cat(found, dim=2)

    def _hear(self, entry: Entry, video: Media, begin: int, end: int) -> Tensor:
        assert self.audio_encoder is not None
        # In a video file time 0 is that of its first picture.
        source, origin = (entry.video, video.begins) if entry.audio is None else (entry.audio, 0.0)
        fps = self.settings.fps
        waveform = read_audio(source, SPEECH_RATE, origin + entry.start + begin / fps, (end - begin) / fps)
        return self.audio_encoder.features(waveform, end - begin).float().cpu()


@dataclasses.dataclass(frozen=True)
class CheckpointEncoders:
    """The encoders of a checkpoint folder, loaded when they are first needed, in every process anew.

    Args:
        folder: a whole Wan-S2V checkpoint; its transformer is not loaded and need not be there.
        what: of `WHAT`; text and speech encoder are loaded where they are named.
        dtype: of the text encoder.
        device: where they run.
        fps: pictures per second, where another than that of the checkpoint is wanted.
    """

    folder: Path
    what: tuple[str, ...] = WHAT
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    fps: int | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.what if name not in WHAT]
        if unknown or "latents" not in self.what:
            raise UserError(f"what: expected latents, and text or audio beside them, got {','.join(self.what)!r}.")

    @cached_property
    def settings(self) -> WanS2VSettings:
        """How the checkpoint is used; raises as `load`."""
        from talkingdit.families.wan_s2v.checkpoint import WanS2VSettings

        file = self.folder / "pipeline.json"
        found = WanS2VSettings.load(file) if file.is_file() else WanS2VSettings()
        return found if self.fps is None else dataclasses.replace(found, fps=self.fps)

    @cached_property
    def loaded(self) -> Encoders:
        """The encoders.

        Raises:
            UserError: a part is missing or does not load.
        """
        from talkingdit.autoencoders.wan import load_vae
        from talkingdit.encoders.umt5 import UMT5Encoder, load_tokenizer, load_umt5
        from talkingdit.encoders.wav2vec import load_speech_encoder
        from talkingdit.families.wan_s2v.checkpoint import find_parts

        parts = find_parts(self.folder)
        vae = load_vae(parts.vae, torch.float32, self.device).requires_grad_(False)
        text = audio = None
        if "text" in self.what:
            umt5 = load_umt5(parts.text_encoder, self.dtype, self.device)
            text = UMT5Encoder(umt5, load_tokenizer(parts.tokenizer)).eval()
        if "audio" in self.what:
            audio = load_speech_encoder(parts.audio_encoder, self.device, fps=self.settings.fps)
        return Encoders(vae, self.settings, text, audio)

    @cached_property
    def fingerprint(self) -> str:
        """Changes where one of the encoders does; the same for a copy of the folder.

        Raises:
            UserError: a part is missing.
        """
        from talkingdit.families.wan_s2v.checkpoint import find_parts

        parts = find_parts(self.folder)
        used = [parts.vae]
        used += [parts.text_encoder, parts.tokenizer] if "text" in self.what else []
        used += [parts.audio_encoder] if "audio" in self.what else []
        digest = hashlib.sha256()
        for part in used:
            for file in sorted(path for path in (part.rglob("*") if part.is_dir() else [part]) if path.is_file()):
                size = file.stat().st_size
                digest.update(f"{file.name} {size} ".encode())
                with file.open("rb") as stream:  # weights are gigabytes; two ends of them tell trained ones apart
                    digest.update(stream.read(1 << 20))
                    stream.seek(max(0, size - (1 << 20)))
                    digest.update(stream.read())
        return digest.hexdigest()[:32]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
