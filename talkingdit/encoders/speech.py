# SPDX-License-Identifier: Apache-2.0
"""What is asked of a speech encoder, and how one that wants a whole voice hears an hour of it.

An encoder is given a voice whole, as the official programs do, up to `WHOLE_SECONDS`. What its layers take grows with
the length, so a longer voice is heard in windows of that length. Two neighbours share `OVERLAP_SECONDS`; in the middle
of these the features of the first fade into those of the second, so that every feature was made with sound on both
sides of it, and none jumps. Level and loudness are those of the whole voice, measured beforehand, and frames keep the
places that they have in the whole.

The features of an encoder that looks no further than the overlap are those of the whole. One with attention over all
of the voice gives others where it would have looked further than its window; docs/reliability.md says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from talkingdit.media.sound import SPEECH_RATE

if TYPE_CHECKING:
    from torch import Tensor

WHOLE_SECONDS = 120  # the longest voice that is heard whole, and the length of a window of a longer one
OVERLAP_SECONDS = 20  # that two windows share
FADE_SECONDS = 10  # in the middle of these
BLOCK = 30 * SPEECH_RATE  # samples that are looked at at once where all of a voice must be


class Sound(Protocol):
    """Samples [n] float32 at 16 kHz, mono: an array, or a file that is read slice by slice."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: Any, /) -> Any:
        """Samples of a slice, an array."""


class SpeechEncoder(Protocol):
    """What pipelines and training ask of a speech encoder: `wav2vec.Wav2VecEncoder`, `log_mel.SpeechFeatures`."""

    def features(self, waveform: np.ndarray | Tensor, frames: int) -> Tensor:
        """Features of the first video frames; those past the end of the sound are silence.

        Args:
            waveform: float [samples], 16 kHz mono, of any loudness; the whole of a recording, as an encoder may look at
                all of it.
            frames: number of columns, at the frame rate that the encoder was made for.

        Returns:
            [layers, audio_dim, frames].

        Raises:
            ValueError: the waveform is not [samples], not finite or too short, or frames < 1.
            UserError: an encoder that needs a loudness finds none.
        """


@dataclass(frozen=True)
class Level:
    """What brings a recording to the level that an encoder wants: (sample - offset) * gain."""

    offset: float = 0.0
    gain: float = 1.0

    def __call__(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        shifted = samples - np.float32(self.offset) if self.offset else samples
        return (shifted * self.gain).astype(np.float32)


@runtime_checkable
class WindowedEncoder(Protocol):
    """What a speech encoder has besides, to hear a recording window by window."""

    def level(self, blocks: Iterable[NDArray[np.float32]]) -> Level:
        """The level of a recording, of which the blocks are all.

        Raises:
            ValueError: samples are not finite.
            UserError: an encoder that needs a loudness finds none.
        """

    def part(self, window: NDArray[np.float32], begin: int, samples: int, first: int, frames: int) -> Tensor:
        """Features of some video frames, which a window of the recording gives.

        Args:
            window: float [n] of the level that `level` says.
            begin: its place in the recording, a multiple of 16,000 samples.
            samples: that the recording has.
            first, frames: which video frames of the recording; all within the window, or past the end of the recording.

        Returns:
            [layers, audio_dim, frames].
        """


@dataclass(frozen=True)
class _Plain:
    """An encoder that knows no windows: each is a recording of its own."""

    encoder: SpeechEncoder

    def level(self, blocks: Iterable[NDArray[np.float32]]) -> Level:
        return Level()

    def part(self, window: NDArray[np.float32], begin: int, samples: int, first: int, frames: int) -> Tensor:
        return self.encoder.features(window, frames)


def pieces(sound: Sound, size: int = BLOCK) -> Iterator[NDArray[np.float32]]:
    """All of a recording, `size` samples at a time."""
    for begin in range(0, len(sound), size):
        yield np.asarray(sound[begin : begin + size], dtype=np.float32)


def is_long(samples: int) -> bool:
    """Is a voice of so many samples heard in windows?"""
    return samples > WHOLE_SECONDS * SPEECH_RATE


def windows(samples: int) -> list[int]:
    """Where the windows of a long voice begin, in seconds. Each ends `WHOLE_SECONDS` later, the last with the voice."""
    step = WHOLE_SECONDS - OVERLAP_SECONDS
    count = max(1, math.ceil((samples / SPEECH_RATE - OVERLAP_SECONDS) / step))
    return [number * step for number in range(count)]


def feature_parts(encoder: SpeechEncoder, sound: Sound, frames: int, fps: float) -> Iterator[Tensor]:
    """Features of a voice in order, which together are those of its first video frames.

    Args:
        encoder: any; it is asked for `WindowedEncoder` where the voice is long.
        sound: the whole voice.
        frames: how many.
        fps: video frames per second, as the encoder was made for.

    Yields:
        [layers, audio_dim, n]: all of them of a voice that is heard whole.

    Raises:
        ValueError, UserError: as `SpeechEncoder.features`.
    """
    if not is_long(len(sound)):
        yield encoder.features(np.asarray(sound[:], dtype=np.float32), frames)
        return
    windowed = encoder if isinstance(encoder, WindowedEncoder) else _Plain(encoder)
    level = windowed.level(pieces(sound))
    begins = windows(len(sound))
    fades = [math.ceil((begin + (OVERLAP_SECONDS - FADE_SECONDS) / 2) * fps) for begin in begins[1:]]
    length = round(FADE_SECONDS * fps)
    fading: Tensor | None = None  # features of the window before, where this one fades in
    for begin, fade_in, fade_out in zip(begins, [0, *fades], [*fades, frames], strict=True):
        if fade_in >= frames:
            return
        end = min(frames, fade_out + length)
        first = math.ceil(begin * fps)
        at = begin * SPEECH_RATE
        window = level(np.asarray(sound[at : at + WHOLE_SECONDS * SPEECH_RATE], dtype=np.float32))
        found = windowed.part(window, at, len(sound), first, end - first)[..., fade_in - first :]
        if fading is not None:
            found = _faded(fading, found, length)
        own = min(fade_out, frames) - fade_in
        yield found[..., :own]
        fading = found[..., own:]


def _faded(before: Tensor, after: Tensor, length: int) -> Tensor:
    """Features that begin as those of the window before and end as those of this one."""
    import torch

    count = before.shape[-1]
    weight = (torch.arange(count, device=after.device, dtype=after.dtype) + 0.5) / length
    return torch.cat([torch.lerp(before, after[..., :count], weight), after[..., count:]], dim=-1)
