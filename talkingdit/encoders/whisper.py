# SPDX-License-Identifier: Apache-2.0
"""The speech encoder of HunyuanVideo-Avatar: every hidden layer of a Whisper encoder around each video frame.

Whisper gives 50 states per second. A video frame at time t sees the ten from 0.08 s before t on: four before it, the
one at it and five behind, with zeros before the beginning.

The official program encodes 30 s at most and cuts the video off after 400 frames, 16 s at 25 fps. Up to there the
features are the same here. Longer voices are heard in windows of 30 s, of which neighbours share 10 s; in the middle of
these the states of the first fade into those of the second, so that every state was made with sound on both sides.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from talkingdit.encoders.speech import Sound
from talkingdit.errors import UserError
from talkingdit.media.sound import SPEECH_RATE

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

STATE_RATE = 50  # states per second
HOP = SPEECH_RATE // STATE_RATE  # samples from one to the next
BEFORE, WINDOW = 4, 10  # states before a video frame, and all that it sees
HEARD_SECONDS = 30  # that Whisper hears at once
SHARED_SECONDS, FADE_SECONDS = 10, 4  # of two windows of a long voice, and in the middle of that


class WhisperEncoder(nn.Module):
    """Waveforms to the features that HunyuanVideo-Avatar was trained on.

    Args:
        encoder: of a Whisper model, any size.
        extractor: makes its log-mel input.
        fps: video frames per second.
    """

    def __init__(self, encoder: Any, extractor: WhisperFeatureExtractor, fps: float = 25.0):
        super().__init__()
        if not fps > 0:
            raise ValueError(f"WhisperEncoder: fps must be positive, got {fps}")
        self.encoder, self.extractor, self.fps = encoder, extractor, float(fps)
        self.layers = int(encoder.config.encoder_layers) + 1
        self.audio_dim = int(encoder.config.d_model)

    @torch.no_grad()
    def states(self, sound: Sound, samples: int | None = None) -> Tensor:
        """All hidden states [n, layers, audio_dim], float32 on the host: what enters each layer, and the output.

        Args:
            sound: float [samples], 16 kHz mono.
            samples: that the states reach to; those past the end of the sound are silence. Default: its end.

        Raises:
            ValueError: the sound is not [samples], empty or not finite.
        """
        count = -(-(len(sound) if samples is None else samples) // HOP)
        if count < 1 or not len(sound):
            raise ValueError("WhisperEncoder: the sound must not be empty")
        heard, step = HEARD_SECONDS * STATE_RATE, (HEARD_SECONDS - SHARED_SECONDS) * STATE_RATE
        found = torch.empty(count, self.layers, self.audio_dim)
        length = FADE_SECONDS * STATE_RATE
        fade_in = (SHARED_SECONDS - FADE_SECONDS) // 2 * STATE_RATE
        rise = ((torch.arange(length) + 0.5) / length)[:, None, None]
        for begin in range(0, max(1, count - SHARED_SECONDS * STATE_RATE), step):
            window = self._window(np.asarray(sound[begin * HOP : (begin + heard) * HOP], dtype=np.float32))
            window = window[: count - begin]
            if not begin:
                found[: len(window)] = window
                continue
            first = begin + fade_in
            mixed = torch.lerp(found[first : first + length], window[fade_in : fade_in + length], rise)
            found[begin + fade_in : begin + len(window)] = window[fade_in:]
            found[first : first + length] = mixed
        return found

    def features(self, waveform: Sound, frames: int) -> Tensor:
        """Features of the first video frames; those past the end of the sound are zero, as in the official program.

        Args:
            waveform: float [samples], 16 kHz mono.
            frames: number of video frames.

        Returns:
            [frames, 10, layers, audio_dim] float32 on the host.

        Raises:
            ValueError: the waveform is not [samples], empty or not finite, or frames < 1.
        """
        if frames < 1:
            raise ValueError(f"WhisperEncoder: frames must be at least 1, got {frames}")
        heard = min(frames, int(len(waveform) * self.fps / SPEECH_RATE))
        result = torch.zeros(frames, WINDOW, self.layers, self.audio_dim)
        if heard:
            last = frame_state(heard - 1, self.fps) - BEFORE + WINDOW
            states = self.states(waveform, max(len(waveform), last * HOP))
            result[:heard] = around(states, torch.arange(heard), self.fps)
        return result

    def forward(self, waveform: Sound, frames: int) -> Tensor:
        """The same as `features`."""
        return self.features(waveform, frames)

    def _window(self, samples: np.ndarray) -> Tensor:
        """States [1500, layers, audio_dim] of up to 30 s of sound."""
        if samples.ndim != 1:
            raise ValueError(f"WhisperEncoder: the sound must be [samples], got shape {tuple(samples.shape)}")
        if not np.isfinite(samples).all():
            raise ValueError("WhisperEncoder: the sound must be finite, got NaN or infinity")
        if not len(samples):
            samples = np.zeros(1, np.float32)
        mel = self.extractor(samples, sampling_rate=SPEECH_RATE, return_tensors="pt").input_features
        weight = next(self.encoder.parameters())
        output = self.encoder(mel.to(weight.device, weight.dtype), output_hidden_states=True)
        return torch.stack([state[0].float().cpu() for state in output.hidden_states], dim=1)


def frame_state(frame: int, fps: float) -> int:
    """The state at a video frame."""
    return round(frame * STATE_RATE / fps)


def around(states: Tensor, frames: Tensor, fps: float) -> Tensor:
    """What video frames int64 [n] see of states [m, layers, dim]: [n, 10, layers, dim]; zeros where there is none."""
    at = torch.tensor([frame_state(frame, fps) for frame in frames.tolist()], dtype=torch.long)
    index = at[:, None] - BEFORE + torch.arange(WINDOW)
    inside = (index >= 0) & (index < len(states))
    return torch.where(inside[..., None, None], states[index.clamp(0, len(states) - 1)], 0)


def load_whisper(
    folder: Path, device: torch.device | str = "cpu", fps: float = 25.0, dtype: torch.dtype = torch.float32
) -> WhisperEncoder:
    """The encoder of a Whisper model in a folder of transformers: config.json, weights, preprocessor_config.json.

    Raises:
        UserError: files are missing or do not load.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Encoder

    from talkingdit.checkpoints.fill import build_empty, fill
    from talkingdit.checkpoints.weights import open_weights, read_bounded

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: the speech encoder is missing; the checkpoint is not complete.")
    read_bounded(folder / "config.json")
    try:
        config = WhisperConfig.from_pretrained(folder, local_files_only=True)
        described = (folder / "preprocessor_config.json").is_file()
        extractor = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True) if described else None
    except Exception as error:  # damaged files raise whatever their reader does
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: the speech encoder does not load ({reason[:200]}).") from error
    weights = open_weights(folder)
    prefix = next((p for p in ("model.encoder.", "encoder.") if f"{p}conv1.weight" in weights.shapes), "")
    encoder = build_empty(lambda: Encoder(config), folder)
    # The decoder is left out.
    weights = weights.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
    filled = fill(encoder, weights, dtype, device, what="a Whisper encoder")
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins) if extractor is None else extractor
    return WhisperEncoder(filled.requires_grad_(False), extractor, fps).eval()
