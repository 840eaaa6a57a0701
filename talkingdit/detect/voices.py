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

GET = "pip install --no-deps Resemblyzer"
RATE, WINDOW, HOP, BANDS = 16000, 400, 160, 40
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
    parts = [samples[round(a * RATE) : round(b * RATE)] for a, b in spans]
    voiced = np.concatenate([np.zeros(0, np.float32), *parts])
    level = 10 * np.log10(np.mean(voiced**2) + 1e-12) if len(voiced) else 0.0
    if level < LOUDNESS:
        voiced = voiced * np.float32(10 ** ((LOUDNESS - level) / 20))
    length = round(SECONDS * RATE)
    starts = range(0, len(voiced) - length + 1, round(every * RATE))
    if not len(starts):
        return np.zeros((0, 256), np.float32)
    pieces = torch.from_numpy(np.stack([voiced[at : at + length] for at in starts]))
    with torch.inference_mode():
        result: Embeddings = encoder(_mel(pieces)).numpy()
    return result


def count_voices(embeddings: Embeddings, likeness: float, least: int = 2) -> int:
    """How many voices there are: groups of embeddings, joined by their mean likeness.

    Args:
        embeddings: [n, d], of length one.
        likeness: cosine of two voices' means from which on they are one.
        least: pieces that a voice has; a single one may lie over a change, or a noise.
    """
    if not len(embeddings):
        return 0
    groups = [[i] for i in range(len(embeddings))]
    alike = embeddings @ embeddings.T
    while len(groups) > 1:
        means = np.array([[alike[np.ix_(a, b)].mean() for b in groups] for a in groups])
        np.fill_diagonal(means, -1)
        i, j = divmod(int(means.argmax()), len(groups))
        if means[i, j] < likeness:
            break
        groups[min(i, j)] += groups.pop(max(i, j))
    return max(1, sum(len(group) >= least for group in groups))


def _mel(pieces: Tensor) -> Tensor:
    """Power of 40 mel bands (Slaney's), as librosa computes them: [n, samples] -> [n, frames, 40]."""
    spectrum = torch.stft(
        pieces, WINDOW, HOP, window=torch.hann_window(WINDOW), center=True, pad_mode="constant", return_complex=True
    )
    return (spectrum.abs().square().transpose(1, 2) @ _bands())[:, : round(SECONDS * RATE) // HOP]


@lru_cache(maxsize=1)
def _bands() -> Tensor:
    from transformers.audio_utils import mel_filter_bank

    bands: NDArray[Any] = mel_filter_bank(
        WINDOW // 2 + 1, BANDS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney"
    )
    return torch.from_numpy(bands).float()


@lru_cache(maxsize=1)
def _encoder() -> _Encoder:
    file = package_file("resemblyzer", "pretrained.pt", GET)
    states = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
    encoder = _Encoder()
    encoder.load_state_dict({name: value for name, value in states.items() if not name.startswith("similarity")})
    return encoder.eval().requires_grad_(False)
