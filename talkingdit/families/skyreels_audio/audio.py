# SPDX-License-Identifier: Apache-2.0
"""The voice as SkyReels-Audio hears it: the last states of a Whisper encoder, so many to a video frame.

Whisper gives 50 states a second. Frame f of a video of r frames a second has n of them, at (f + j / n) / r seconds;
where these lie between two states, what lies on the line between them. At 25 frames a second and n = 2 they are
Whisper's states themselves. So the sound is resampled to the video, whatever its rate (section 2.4, step (i)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from talkingdit.encoders.speech import Sound
from talkingdit.encoders.whisper import HOP, STATE_RATE, WhisperEncoder
from talkingdit.media.sound import SPEECH_RATE


class WhisperTokens:
    """A speech encoder (`talkingdit.encoders.speech.SpeechEncoder`).

    Args:
        whisper: the encoder.
        layers: states of a video frame, n.
        fps: video frames per second.
    """

    def __init__(self, whisper: WhisperEncoder, layers: int, fps: float):
        self.whisper, self.layers, self.fps = whisper, layers, float(fps)
        self.audio_dim = whisper.audio_dim

    def at(self, fps: float) -> WhisperTokens:
        """The same for videos of another rate."""
        return WhisperTokens(self.whisper, self.layers, fps)

    def features(self, waveform: Sound, frames: int) -> Tensor:
        """[n, audio_dim, frames] float32 on the host; silence past the end of the sound.

        Raises:
            ValueError: the waveform is not [samples], empty or not finite, or frames < 1.
        """
        if frames < 1:
            raise ValueError(f"WhisperTokens: frames must be at least 1, got {frames}")
        wanted = int(frames * SPEECH_RATE / self.fps) + 2 * HOP
        states = self.whisper.states(waveform, max(len(waveform), wanted))[:, -1]
        at = torch.arange(frames * self.layers, dtype=torch.float64) * (STATE_RATE / self.fps / self.layers)
        at = at.clamp(max=len(states) - 1)
        low = at.floor().long()
        high = (low + 1).clamp(max=len(states) - 1)
        found = torch.lerp(states[low], states[high], (at - low).float()[:, None])
        return found.unflatten(0, (frames, self.layers)).permute(1, 2, 0).contiguous()

    def __call__(self, waveform: Sound, frames: int) -> Tensor:
        """The same as `features`."""
        return self.features(waveform, frames)
