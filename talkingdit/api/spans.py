# SPDX-License-Identifier: Apache-2.0
"""What a stream yields: frames that have become final, where they are in the video, and what is heard meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.pipelines.inputs import Frames, Inputs, Outline

Samples = NDArray[np.float32]  # [n, channels]


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameSpan:
    """Frames of a video, one behind the other. Where an array is expected it stands for its frames.

    Attributes:
        frames: uint8 [n, H, W, 3], n > 0.
        start: number of the first one in the video; spans follow each other without a gap.
        fps: frames per second of the video.
        audio: what is heard while they are seen, float32 [m, channels] as in the recording, and its rate in Hz; less
            where the recording ends before.
    """

    frames: Frames
    start: int
    fps: int | Fraction
    audio: tuple[Samples, int]

    @property
    def seconds(self) -> tuple[float, float]:
        """From when to when they are seen."""
        return float(self.start / self.fps), float((self.start + len(self)) / self.fps)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.frames.shape

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        return self.frames.dtype

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: Any) -> Any:
        return self.frames[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.frames, dtype=dtype, copy=bool(copy) or dtype not in (None, self.dtype))


def spans(frames: Iterator[Frames], inputs: Inputs, outline: Outline) -> Iterator[FrameSpan]:
    """Frames [n, H, W, 3] as they come, with their places and their sound.

    Args:
        frames: of the video, in order.
        inputs, outline: of the video.
    """
    start, sound = 0, _Sound(inputs, outline)
    try:
        for block in frames:
            end = start + len(block)
            heard = sound.until(Fraction(end) / outline.fps)
            yield FrameSpan(frames=block, start=start, fps=outline.fps, audio=(heard, sound.rate))
            start = end
    finally:
        sound.close()


class _Sound:
    """The sound of a video, read on as it is wanted."""

    def __init__(self, inputs: Inputs, outline: Outline) -> None:
        from talkingdit.media.sound import SPEECH_RATE, channel_blocks, sound_form
        from talkingdit.pipelines.live import LiveSound

        skip, job = Fraction(outline.skipped_frames, outline.fps), inputs.job
        self._blocks: Any
        if isinstance(inputs.sound, LiveSound):
            self.rate, channels, self._blocks = SPEECH_RATE, 1, inputs.sound.blocks(skip)
        else:
            self.rate, channels = sound_form(job.audio)
            self._blocks = channel_blocks(job.audio, None, skip)
        self._rest = np.zeros((0, channels), np.float32)
        self._given = 0

    def until(self, second: Fraction) -> Samples:
        """The next samples [n, channels], up to a moment."""
        wanted = round(second * self.rate) - self._given
        found = [self._rest]
        while sum(map(len, found)) < wanted and (block := next(self._blocks, None)) is not None:
            found.append(block)
        samples = np.concatenate(found)
        self._rest = samples[wanted:]
        self._given += len(samples[:wanted])
        return samples[:wanted]

    def close(self) -> None:
        self._blocks.close()
