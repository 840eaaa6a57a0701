# SPDX-License-Identifier: Apache-2.0
"""The speech encoder of Wan-S2V: every hidden layer of a wav2vec 2.0 model (transformers), one column a video frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from talkingdit.checkpoints.weights import check_index, read_bounded, some
from talkingdit.encoders.speech import Level
from talkingdit.errors import UserError
from talkingdit.media.sound import SPEECH_RATE

if TYPE_CHECKING:
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

HIDDEN_RATE = 50  # hidden states per second
VARIANCE_FLOOR = 1e-7  # that the extractor adds
AUDIO_FPS = 30  # rate to which the official program resamples them before it picks those of the video


def frame_indices(frames: int, fps: float, audio_fps: int = AUDIO_FPS) -> np.ndarray:
    """Which feature at `audio_fps` each of the first video frames takes: the nearest one, halves to even."""
    return np.round(np.arange(frames) / fps * audio_fps).astype(np.int64)


class Wav2VecEncoder(nn.Module):
    """Waveforms to the features that Wan-S2V was trained on.

    All hidden states of the model (the input of the first layer and the output of each), linearly interpolated from
    50 to 30 per second with aligned ends, of which each video frame takes the nearest in time.

    Args:
        model: the encoder, any size.
        extractor: brings the waveform to zero mean and unit variance where the model wants that.
        fps: video frames per second.
    """

    def __init__(self, model: Wav2Vec2Model, extractor: Wav2Vec2FeatureExtractor, fps: float = 16.0):
        super().__init__()
        if not fps > 0:
            raise ValueError(f"Wav2VecEncoder: fps must be positive, got {fps}")
        self.model = model
        self.extractor = extractor
        self.fps = float(fps)
        self.layers = int(model.config.num_hidden_layers) + 1
        self.audio_dim = int(model.config.hidden_size)

    def hidden_states(self, waveform: np.ndarray | Tensor) -> tuple[Tensor, ...]:
        """Hidden states [1, T, audio_dim] of every layer, about 50 per second."""
        samples = torch.as_tensor(waveform, dtype=torch.float32).cpu()
        if samples.ndim != 1:
            raise ValueError(f"Wav2VecEncoder: waveform must be [samples], got shape {tuple(samples.shape)}")
        if not torch.isfinite(samples).all():
            raise ValueError("Wav2VecEncoder: waveform must be finite, got NaN or infinity")
        if samples.shape[0] < SPEECH_RATE // 10:
            raise ValueError(f"Wav2VecEncoder: waveform must last 0.1 s at least, got {samples.shape[0]} samples")
        values = self.extractor(samples.numpy(), sampling_rate=SPEECH_RATE, return_tensors="pt").input_values
        return self._states(values)

    def _states(self, values: Tensor) -> tuple[Tensor, ...]:
        """Hidden states [1, T, audio_dim] of every layer, of samples [1, n] of the level that the model wants."""
        weight = next(self.model.parameters())
        return self.model(values.to(weight.device, weight.dtype), output_hidden_states=True).hidden_states

    @torch.no_grad()
    def features(self, waveform: np.ndarray | Tensor, frames: int | None = None) -> Tensor:
        """Features of the first `frames` video frames; those past the end of the sound are zero.

        Args:
            waveform: float [samples], 16 kHz mono.
            frames: number of columns; default: as many frames as begin within the features.

        Returns:
            [layers, audio_dim, frames] in the dtype and on the device of the encoder.

        Raises:
            ValueError: the waveform is not [samples], not finite or shorter than 0.1 s, or frames < 1.
        """
        if frames is not None and frames < 1:
            raise ValueError(f"Wav2VecEncoder: frames must be at least 1, got {frames}")
        states = self.hidden_states(waveform)
        resampled = int(states[0].shape[1] / float(HIDDEN_RATE) * AUDIO_FPS)
        if frames is None:
            enough = frame_indices(math.ceil(resampled / AUDIO_FPS * self.fps) + 1, self.fps)
            frames = int(np.count_nonzero(enough < resampled))
        indices = frame_indices(frames, self.fps)
        inside = torch.from_numpy(indices[indices < resampled]).to(states[0].device)
        result = states[0].new_zeros(len(states), states[0].shape[2], frames)
        # Layer by layer: all of them at 30 per second would take much more room than what the video needs.
        for row, state in zip(result, states, strict=True):
            slow = F.interpolate(state.transpose(1, 2), size=resampled, mode="linear", align_corners=True)
            row[:, : len(inside)] = slow[0, :, inside]
        return result

    def level(self, blocks: Iterable[NDArray[np.float32]]) -> Level:
        """Zero mean and unit variance, as the extractor makes it; see `talkingdit.encoders.speech.WindowedEncoder`."""
        count, total, square = 0, 0.0, 0.0
        for block in blocks:
            count += len(block)
            total += float(block.sum(dtype=np.float64))
            square += float(np.square(block, dtype=np.float64).sum())
        if not math.isfinite(square):
            raise ValueError("Wav2VecEncoder: waveform must be finite, got NaN or infinity")
        if not self.extractor.do_normalize:
            return Level()
        mean = total / count
        return Level(mean, 1 / math.sqrt(max(square / count - mean**2, 0.0) + VARIANCE_FLOOR))

    @torch.no_grad()
    def part(self, window: NDArray[np.float32], begin: int, samples: int, first: int, frames: int) -> Tensor:
        """See `talkingdit.encoders.speech.WindowedEncoder`.

        Hidden states of a window are at the same places in time as those of the whole, of which the window has state
        `begin` / 320 and the ones behind it. Frames take theirs where interpolating the whole would.
        """
        states = self._states(torch.from_numpy(window)[None])
        before, (of_all, has) = begin // self._hop, (self._count(samples), states[0].shape[1])
        resampled = int(of_all / float(HIDDEN_RATE) * AUDIO_FPS)
        indices = frame_indices(first + frames, self.fps)[first:]
        inside = indices[indices < resampled]
        place = inside * ((of_all - 1) / max(resampled - 1, 1)) - before
        low = np.clip(np.floor(place), 0, has - 1).astype(np.int64)
        high = np.minimum(low + 1, has - 1)
        device, dtype = states[0].device, states[0].dtype
        weight = torch.from_numpy(np.clip(place - low, 0, 1)).to(device, dtype)
        result = states[0].new_zeros(len(states), states[0].shape[2], frames)
        for row, state in zip(result, states, strict=True):
            columns = state[0].transpose(0, 1)
            row[:, : len(inside)] = torch.lerp(
                columns[:, torch.from_numpy(low).to(device)], columns[:, torch.from_numpy(high).to(device)], weight
            )
        return result

    @property
    def _hop(self) -> int:
        """Samples from one hidden state to the next."""
        return math.prod(self.model.config.conv_stride)

    def _count(self, samples: int) -> int:
        """Hidden states of so many samples."""
        config = self.model.config
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def forward(self, waveform: np.ndarray | Tensor, frames: int | None = None) -> Tensor:
        """The same as `features`."""
        return self.features(waveform, frames)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bar and the table of weights left out that transformers prints."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_speech_encoder(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, fps: float = 16.0
) -> Wav2VecEncoder:
    """The encoder in a folder of transformers: config.json, weights, preprocessor_config.json.

    The last may also lie beside it in audio_processor/, as diffusers saves it. The output layer that speech recognition
    has on top is left out.

    Raises:
        UserError: files are missing or do not load.
    """
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: the speech encoder is missing; the checkpoint is not complete.")
    beside = folder.parent / "audio_processor"
    read_bounded(folder / "config.json")
    check_index(folder)
    processor = folder if (folder / "preprocessor_config.json").is_file() or not beside.is_dir() else beside
    try:
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(processor, local_files_only=True)
        with quiet():
            loaded: Any = Wav2Vec2Model.from_pretrained(
                folder, local_files_only=True, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # damaged files raise whatever their reader does
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: the speech encoder does not load ({reason[:200]}).") from error
    model, report = loaded
    # The embedding of masked frames is for training alone, and some files lack it.
    lost = sorted(set(report["missing_keys"]) - {"masked_spec_embed"})
    if lost:
        raise UserError(f"{folder}: the speech encoder lacks {len(lost)} weights: {some(lost)}.")
    return Wav2VecEncoder(model.to(device).requires_grad_(False), extractor, fps).eval()
