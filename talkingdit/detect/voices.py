# SPDX-License-Identifier: Apache-2.0
"""Who speaks: embeddings of voices (GE2E, arXiv:1710.10467), with the weights that the package Resemblyzer carries.

The package is found, not imported: `pip install --no-deps Resemblyzer` is all that is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from talkingdit.detect.packages import package_file
from talkingdit.media.sound import SPEECH_RATE

GET = "pip install --no-deps Resemblyzer"
WINDOW, HOP, BANDS = 400, 160, 40
SECONDS = 1.6  # of a piece of which the network makes one embedding, as it was trained
LOUDNESS = -30.0  # dBFS, to which quieter voices are brought

Embeddings = NDArray[np.float32]


class _Encoder(nn.Module):
    """Three LSTM layers over a mel spectrogram; the last state, projected, cut at zero and brought to length one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mel: Tensor) -> Tensor:  # [n, frames, 40] -> [n, 256]
        _, (hidden, _) = self.lstm(mel)
        return nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=1)


def embed(samples: NDArray[np.float32], spans: Sequence[tuple[float, float]], every: float = 0.8) -> Embeddings:
    """Embeddings of what is spoken.

    Args:
        samples: float32 [n], 16 kHz mono.
        spans: seconds (from, to) in which somebody speaks.
        every: seconds between pieces of 1.6 s, which lie in the speech alone, joined.

    Returns:
        float32 [pieces, 256], of length one; none where less than 1.6 s are spoken.

    Raises:
        NotInstalledError: the weights are not installed.
    """
    encoder = _encoder()
    parts = [samples[round(a * SPEECH_RATE) : round(b * SPEECH_RATE)] for a, b in spans]
    voiced = np.concatenate([np.zeros(0, np.float32), *parts])
    level = 10 * np.log10(np.mean(voiced**2) + 1e-12) if len(voiced) else 0.0
    if level < LOUDNESS:
        voiced = voiced * np.float32(10 ** ((LOUDNESS - level) / 20))
    length = round(SECONDS * SPEECH_RATE)
    starts = range(0, len(voiced) - length + 1, round(every * SPEECH_RATE))
    if not len(starts):
        return np.zeros((0, 256), np.float32)
    pieces = torch.from_numpy(np.stack([voiced[at : at + length] for at in starts]))
    with torch.inference_mode():
        result: Embeddings = encoder(_mel(pieces)).numpy()
    return result


def count_voices(embeddings: Embeddings, likeness: float, overlap: int = 1) -> int:
    """How many voices there are: speech is divided where it changes most, and parts that are alike are one voice.

    Means of many pieces are compared, not pieces: a piece of 1.6 s varies with what is said, and may lie over a change.

    Args:
        embeddings: [n, d], of length one, in the order of time.
        likeness: cosine of two parts' means from which on one person says both.
        overlap: pieces that share speech with a piece, on either side.
    """
    if not len(embeddings):
        return 0
    voices: list[Embeddings] = []
    for begin, end in _parts(embeddings, 0, len(embeddings), likeness, overlap):
        mean = embeddings[begin:end].mean(0)
        mean = mean / np.linalg.norm(mean)
        if all(float(mean @ other) < likeness for other in voices):
            voices.append(mean)
    return len(voices)


def likeness_of_parts(embeddings: Embeddings, overlap: int = 1) -> float:
    """The cosine of the means before and after the place where speech changes most; 1 where it is too short to tell."""
    return _change(embeddings, 0, len(embeddings), overlap)[0]


def _parts(e: Embeddings, begin: int, end: int, likeness: float, overlap: int) -> list[tuple[int, int]]:
    """Where speech of one voice begins and ends, in pieces."""
    alike, where = _change(e, begin, end, overlap)
    if alike >= likeness:
        return [(begin, end)]
    half = _half(overlap)
    left = _parts(e, begin, where - half, likeness, overlap)
    return left + _parts(e, where + half, end, likeness, overlap)


def _change(e: Embeddings, begin: int, end: int, overlap: int) -> tuple[float, int]:
    """The least cosine of the means before and after a place, and this place; pieces that lie over it do not count."""
    half = _half(overlap)
    best, where = 1.0, 0
    sums = np.concatenate([np.zeros((1, e.shape[1])), np.cumsum(e, 0, dtype=np.float64)])
    for at in range(begin + half + 1, end - half):
        before, after = sums[at - half] - sums[begin], sums[end] - sums[at + half]
        alike = float(before @ after / max(1e-9, np.linalg.norm(before) * np.linalg.norm(after)))
        if alike < best:
            best, where = alike, at
    return best, where


def _half(overlap: int) -> int:
    """Pieces on either side of a place that do not count: as much from before it as from after is in them."""
    return max(1, overlap // 4)


def _mel(pieces: Tensor) -> Tensor:
    """Power of 40 mel bands (Slaney's), as librosa computes them: [n, samples] -> [n, frames, 40]."""
    spectrum = torch.stft(
        pieces, WINDOW, HOP, window=torch.hann_window(WINDOW), center=True, pad_mode="constant", return_complex=True
    )
    return (spectrum.abs().square().transpose(1, 2) @ _bands())[:, : round(SECONDS * SPEECH_RATE) // HOP]


@lru_cache(maxsize=1)
def _bands() -> Tensor:
    from transformers.audio_utils import mel_filter_bank

    bands: NDArray[Any] = mel_filter_bank(
        WINDOW // 2 + 1, BANDS, 0.0, SPEECH_RATE / 2, SPEECH_RATE, norm="slaney", mel_scale="slaney"
    )
    return torch.from_numpy(bands).float()


@lru_cache(maxsize=1)
def _encoder() -> _Encoder:
    file = package_file("resemblyzer", "pretrained.pt", GET)
    states = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
    encoder = _Encoder()
    encoder.load_state_dict({name: value for name, value in states.items() if not name.startswith("similarity")})
    return encoder.eval().requires_grad_(False)
