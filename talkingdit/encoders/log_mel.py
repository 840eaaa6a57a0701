# SPDX-License-Identifier: Apache-2.0
"""Speech features at the video's frame rate.

Audio encoders turn a 16 kHz mono waveform into a tensor [layers, audio_dim, frames], one column per video frame; the
model then learns a weighted average over the layers. `SpeechFeatures` is the encoder of the tiny model: a log-mel
spectrogram and its time derivative, with no weights to load. The waveform is brought to a fixed loudness first, once
per file and not once per chunk:

    features = SpeechFeatures(fps=16).features(waveform, frames)

is the same as

    features = SpeechFeatures(fps=16)(normalise_loudness(waveform), frames)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from talkingdit.encoders.speech import Level, pieces
from talkingdit.errors import UserError
from talkingdit.media.sound import SPEECH_RATE

LOUDNESS_DBFS = -23.0  # RMS of the active parts after normalise_loudness
LEVEL_SAMPLES = SPEECH_RATE // 50  # 20 ms, of which each has a level
ACTIVE_RANGE_DB = 30.0  # a 20 ms frame is active when it is at most this far below the 95th percentile
SILENCE_RMS = 1e-5  # -100 dBFS: below the noise of any 16-bit recording

HOPS_PER_FRAME = 4  # hops a video frame lasts; 1/64 s each at 16 frames per second
CONTEXT_HOPS = 2  # hops of context on either side of a video frame: half a frame
MEL_BINS = 20
MEL_RANGE = (60.0, 7600.0)  # Hz
WINDOW = 400  # samples, 25 ms
FFT = 512
POWER_FLOOR = 1e-6  # mean square in a band; speech after normalise_loudness is at 5e-3 in all

# Mean and standard deviation of log(POWER_FLOOR + power) per mel bin, and standard deviation of its difference over
# +-1 hop, measured over the training voices (training/voices.py) after normalise_loudness.
LOG_MEL_MEAN = (
    -5.37,
    -5.53,
    -6.55,
    -7.25,
    -8.46,
    -9.22,
    -9.82,
    -10.32,
    -10.6,
    -10.69,
    -10.83,
    -11.01,
    -11.13,
    -11.08,
    -11.52,
    -11.98,
    -12.28,
    -12.48,
    -12.61,
    -12.47,
)
LOG_MEL_STD = (
    4.35,
    4.4,
    4.19,
    4.09,
    3.79,
    3.57,
    3.24,
    2.99,
    2.84,
    2.77,
    2.63,
    2.5,
    2.39,
    2.34,
    2.06,
    1.79,
    1.67,
    1.59,
    1.64,
    1.79,
)
DELTA_STD = 2.07


def loudness_gain(blocks: Iterable[NDArray[np.float32]]) -> float:
    """The factor that brings the RMS of the active (spoken) parts of a recording to -23 dBFS.

    Pauses do not count: a 20 ms frame is active when its level is within 30 dB of the 95th percentile of all frames
    that hold any signal.

    Args:
        blocks: all of the recording, float [n] each, 16 kHz mono, any level.

    Raises:
        UserError: the recording is not one-dimensional, empty, not finite, or silent.
    """
    level = np.concatenate([np.zeros(0), *_levels(blocks)])
    if not level.size:
        raise UserError("normalise_loudness: waveform must be [samples] and not empty, got shape (0,)")
    if level.max() < SILENCE_RMS:
        raise UserError(
            f"normalise_loudness: waveform must hold sound, got silence (loudest 20 ms at "
            f"{20 * math.log10(max(float(level.max()), 1e-15)):.0f} dBFS)"
        )
    sounding = level[level > level.max() * 1e-3]
    active = level[level >= np.percentile(sounding, 95) * 10 ** (-ACTIVE_RANGE_DB / 20)]
    return 10 ** (LOUDNESS_DBFS / 20) / math.sqrt(float(np.mean(active**2)))


def _levels(blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float64]]:
    """RMS of every 20 ms of a recording; the last ones are filled up with silence."""
    rest = np.zeros(0, np.float32)
    for block in blocks:
        if block.ndim != 1:
            raise UserError(f"normalise_loudness: waveform must be [samples] and not empty, got shape {block.shape}")
        if not np.isfinite(block).all():
            raise UserError("normalise_loudness: waveform must be finite, got NaN or infinity")
        joined = np.concatenate([rest, block]) if rest.size else block
        whole = len(joined) - len(joined) % LEVEL_SAMPLES
        yield _rms(joined[:whole])
        rest = joined[whole:]
    yield _rms(np.pad(rest, (0, -len(rest) % LEVEL_SAMPLES)))


def _rms(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.sqrt(np.mean(np.square(samples.reshape(-1, LEVEL_SAMPLES), dtype=np.float64), axis=1))


def normalise_loudness(waveform: np.ndarray) -> np.ndarray:
    """Scale a waveform by its `loudness_gain`.

    One factor for the whole waveform, so that features and visemes, which use fixed thresholds, are local functions of
    the result.

    Args:
        waveform: float array [samples], 16 kHz mono, any level.

    Returns:
        float32 array [samples]. The result may exceed 1 at peaks: it is for analysis, not for a file.

    Raises:
        UserError: the waveform is not one-dimensional, empty, not finite, or silent.
    """
    samples = np.asarray(waveform, dtype=np.float32)
    gain = loudness_gain(pieces(samples) if samples.ndim == 1 else [samples])
    return (samples * gain).astype(np.float32)


def hop_windows(waveform: Tensor, fps: float, first: int, count: int, begin: int = 0) -> Tensor:
    """Cut windows of 25 ms around the centres of hops `first` .. `first + count - 1`; sound outside is silence.

    Hop h lasts from h / (4 fps) to (h + 1) / (4 fps) seconds.

    Args:
        waveform: float32 [samples] at 16 kHz.
        begin: sample of the recording with which the waveform begins; hops are those of the recording.

    Returns:
        float32 [count, 400], no taper applied.
    """
    hop = SPEECH_RATE / (HOPS_PER_FRAME * fps)
    centres = torch.round((torch.arange(first, first + count, dtype=torch.float64) + 0.5) * hop).long()
    starts = centres - begin - WINDOW // 2
    # Hops far outside the sound read silence; a margin of one window on each side is enough for all of them.
    padded = nn.functional.pad(waveform, (WINDOW, WINDOW))
    starts = (starts + WINDOW).clamp(0, waveform.shape[0] + WINDOW)
    return padded.unfold(0, WINDOW, 1)[starts.to(waveform.device)]


def mel_filters(bins: int = MEL_BINS, low: float = MEL_RANGE[0], high: float = MEL_RANGE[1]) -> Tensor:
    """Triangular mel filters float32 [257, bins], each with weights that sum to one (a mean of the power spectrum)."""

    def to_mel(hz: float) -> float:
        return 2595.0 * math.log10(1.0 + hz / 700.0)

    edges = 700.0 * (10 ** (torch.linspace(to_mel(low), to_mel(high), bins + 2, dtype=torch.float64) / 2595.0) - 1.0)
    frequency = torch.arange(FFT // 2 + 1, dtype=torch.float64)[:, None] * SPEECH_RATE / FFT
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    weights = torch.minimum(rising, falling).clamp(min=0.0)
    return (weights / weights.sum(0)).float()


class SpeechFeatures(nn.Module):
    """Log-mel spectrogram and its time derivative, one column per video frame: [2, 160, frames].

    Column f holds 8 hops x 20 mel bins (hop-major): hops 4f-2 .. 4f+5, the frame itself and half a frame on either
    side, so that a column says everything about the sound of its frame. Layer 0 is log(1e-6 + power), layer 1 its
    difference over +-1 hop; both are shifted and scaled by fixed constants to about zero mean and unit variance.
    Sound before the beginning and after the end is silence. There is nothing to train and nothing to save.

    Args:
        fps: video frames per second; hops are 1/(4 fps) seconds, 1/64 s at 16 frames per second.
    """

    layers = 2
    audio_dim = (HOPS_PER_FRAME + 2 * CONTEXT_HOPS) * MEL_BINS

    def __init__(self, fps: float = 16.0) -> None:
        super().__init__()
        if not fps > 0:
            raise ValueError(f"SpeechFeatures: fps must be positive, got {fps}")
        self.fps = float(fps)
        taper = torch.hann_window(WINDOW, periodic=False)
        self.register_buffer("taper", taper / taper.square().sum().sqrt(), persistent=False)
        self.register_buffer("filters", mel_filters(), persistent=False)
        self.register_buffer("mean", torch.tensor(LOG_MEL_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(LOG_MEL_STD), persistent=False)

    def log_mel(self, waveform: Tensor, first: int, count: int, begin: int = 0) -> Tensor:
        """Log power per mel bin of hops `first` .. `first + count - 1`, not scaled: float32 [count, 20].

        `begin` as in `hop_windows`.
        """
        taper, filters = self.get_buffer("taper"), self.get_buffer("filters")
        spectrum = torch.fft.rfft(hop_windows(waveform, self.fps, first, count, begin) * taper, n=FFT)
        return torch.log(POWER_FLOOR + (spectrum.real.square() + spectrum.imag.square()) @ filters)

    def features(self, waveform: np.ndarray | Tensor, frames: int | None = None) -> Tensor:
        """Features of a whole recording of any loudness: see `talkingdit.encoders.speech.SpeechEncoder`.

        Raises:
            UserError: the waveform is empty, silent or not finite.
            ValueError: frames < 1.
        """
        samples = waveform.cpu().numpy() if isinstance(waveform, Tensor) else waveform
        return self.forward(normalise_loudness(samples), frames)

    @torch.no_grad()
    def forward(self, waveform: np.ndarray | Tensor, frames: int | None = None) -> Tensor:
        """Features of `frames` video frames from the beginning of the waveform.

        Args:
            waveform: [samples], 16 kHz mono, after `normalise_loudness`.
            frames: number of columns; default: as many frames as begin within the sound.

        Returns:
            float32 [2, 160, frames] on the device of this module.

        Raises:
            ValueError: the waveform is not [samples] or not finite, or frames < 1.
        """
        samples = torch.as_tensor(waveform, dtype=torch.float32, device=self.get_buffer("mean").device)
        if samples.ndim != 1 or samples.numel() == 0:
            raise ValueError(
                f"SpeechFeatures: waveform must be [samples] and not empty, got shape {tuple(samples.shape)}"
            )
        if not torch.isfinite(samples).all():
            raise ValueError("SpeechFeatures: waveform must be finite, got NaN or infinity")
        if frames is None:
            frames = math.ceil(samples.shape[0] * self.fps / SPEECH_RATE)
        if frames < 1:
            raise ValueError(f"SpeechFeatures: frames must be at least 1, got {frames}")
        return self._columns(samples, 0, 0, frames)

    def level(self, blocks: Iterable[NDArray[np.float32]]) -> Level:
        """See `talkingdit.encoders.speech.WindowedEncoder`."""
        return Level(gain=loudness_gain(blocks))

    @torch.no_grad()
    def part(self, window: NDArray[np.float32], begin: int, samples: int, first: int, frames: int) -> Tensor:
        """See `talkingdit.encoders.speech.WindowedEncoder`."""
        return self._columns(torch.from_numpy(window).to(self.get_buffer("mean").device), begin, first, frames)

    def _columns(self, waveform: Tensor, begin: int, first: int, frames: int) -> Tensor:
        """[2, 160, frames] of frames `first` ... of a recording, of which the waveform begins at sample `begin`."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        hops = HOPS_PER_FRAME * frames + 2 * CONTEXT_HOPS
        # One hop more on each side for the differences.
        log_mel = self.log_mel(waveform, HOPS_PER_FRAME * first - CONTEXT_HOPS - 1, hops + 2, begin)
        level = (log_mel[1:-1] - mean) / std
        delta = (log_mel[2:] - log_mel[:-2]) / DELTA_STD
        width = HOPS_PER_FRAME + 2 * CONTEXT_HOPS
        columns = torch.stack([level, delta]).unfold(1, width, HOPS_PER_FRAME)  # [2, frames, 20, 8]
        return columns.permute(0, 3, 2, 1).reshape(self.layers, self.audio_dim, frames).contiguous()
