# SPDX-License-Identifier: Apache-2.0
"""What the transformer hears of a voice: features around any video frame of it, kept where there is room."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from talkingdit.encoders.log_mel import CONTEXT_HOPS, HOPS_PER_FRAME, MEL_BINS, SpeechFeatures
from talkingdit.encoders.speech import Sound
from talkingdit.encoders.whisper import HOP, WINDOW, WhisperEncoder, frame_state
from talkingdit.media.sound import SILENCE_PEAK, SPEECH_RATE


class HeardVoice(Protocol):
    """Features of all video frames of a voice."""

    def at(self, frames: Tensor) -> Tensor:
        """Features of video frames int64 [n]: [n, window, blocks, channels]; zeros behind the end of the voice."""


def feature_shape(encoder: Any) -> tuple[int, int, int]:
    """Places in time, hidden states and width of the features of a video frame."""
    if isinstance(encoder, SpeechFeatures):
        return HOPS_PER_FRAME + 2 * CONTEXT_HOPS, encoder.layers, MEL_BINS
    return WINDOW, encoder.layers, encoder.audio_dim


def hear(encoder: Any, sound: Sound, frames: int) -> HeardVoice:
    """A voice as a speech encoder hears it.

    Args:
        encoder: `WhisperEncoder`, or `SpeechFeatures` of the drawn world.
        sound: float [samples] at 16 kHz.
        frames: video frames that are asked for at most.

    Raises:
        ValueError: a sound that is none.
    """
    heard = min(frames, int(len(sound) * encoder.fps / SPEECH_RATE))
    if isinstance(encoder, WhisperEncoder):
        last = frame_state(max(heard - 1, 0), encoder.fps) + WINDOW
        return WhisperVoice(encoder.states(sound, max(last * HOP, 1)), heard, encoder.fps)
    samples = np.asarray(sound[:], dtype=np.float32)
    frames = max(frames, 1)
    if np.abs(samples).max(initial=0) < SILENCE_PEAK:  # has no loudness to be brought to
        columns = encoder(torch.zeros(max(len(samples), 1)), frames)
    else:
        columns = encoder.features(samples, frames)
    return DrawnVoice(columns)


class WhisperVoice:
    """Whisper's states of a voice; frames are put together where they are asked for, ten times the room."""

    def __init__(self, states: Tensor, heard: int, fps: float):
        self._states, self._heard, self._fps = states, heard, fps

    def at(self, frames: Tensor) -> Tensor:
        from talkingdit.encoders.whisper import around

        found = around(self._states, frames, self._fps)
        return torch.where((frames < self._heard)[:, None, None, None], found, 0)


class DrawnVoice:
    """Log-mel features [2, 8 hops * 20 bins, F]; silence behind the end."""

    def __init__(self, columns: Tensor):
        self._columns = columns

    def at(self, frames: Tensor) -> Tensor:
        layers, width, count = self._columns.shape
        columns = self._columns[..., frames.clamp(max=count - 1)]
        windows = columns.reshape(layers, width // MEL_BINS, MEL_BINS, len(frames)).permute(3, 1, 0, 2)
        return torch.where((frames < count)[:, None, None, None], windows, 0)
