# SPDX-License-Identifier: Apache-2.0
"""SyncNet (Chung and Zisserman 2016): how far a mouth and a voice are apart, at every shift between them.

Its weights, syncnet_v2.model, are given by the user. It reads five faces of 25 frames per second and 0.2 s of sound, as
13 mel-frequency cepstral coefficients every 10 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from talkingdit.detect.given import why
from talkingdit.errors import UserError
from talkingdit.media.sound import SPEECH_RATE

FPS = 25
WINDOW = 5  # frames that are read at once
SHIFTS = 15  # frames, to both sides
HOP, LENGTH, BINS = 160, 400, 512  # samples of a step, of a piece of sound, of its spectrum
MELS, CEPSTRA, LIFTER, PREEMPHASIS = 26, 13, 22, 0.97
BATCH = 20

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sync:
    """What SyncNet says of a clip.

    Attributes:
        confidence: Sync-C, median minus least of the mean distances over shifts.
        distance: Sync-D, the least of them.
        offset: frames of 25 per second by which the mouth is late there.
    """

    confidence: float
    distance: float
    offset: int


def _block(convolution: nn.Module, channels: int, pool: nn.Module | None = None) -> list[nn.Module]:
    norm: type[nn.Module] = nn.BatchNorm3d if isinstance(convolution, nn.Conv3d) else nn.BatchNorm2d
    found = [convolution, norm(channels), nn.ReLU(inplace=True)]
    return found if pool is None else [*found, pool]


def _head(size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, size))


class SyncNet(nn.Module):
    """The network; names of its parts are those of the released weights."""

    size = 1024  # of the embeddings

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_block(nn.Conv2d(1, 64, 3, padding=1), 64, nn.MaxPool2d(1, 1)),
            *_block(nn.Conv2d(64, 192, 3, padding=1), 192, nn.MaxPool2d(3, (1, 2))),
            *_block(nn.Conv2d(192, 384, 3, padding=1), 384),
            *_block(nn.Conv2d(384, 256, 3, padding=1), 256),
            *_block(nn.Conv2d(256, 256, 3, padding=1), 256, nn.MaxPool2d(3, 2)),
            *_block(nn.Conv2d(256, 512, (5, 4)), 512),
        )
        self.netfcaud = _head(self.size)
        self.netfclip = _head(self.size)
        flat = (1, 3, 3)
        self.netcnnlip = nn.Sequential(
            *_block(nn.Conv3d(3, 96, (5, 7, 7), (1, 2, 2)), 96, nn.MaxPool3d(flat, (1, 2, 2))),
            *_block(nn.Conv3d(96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)), 256, nn.MaxPool3d(flat, (1, 2, 2), (0, 1, 1))),
            *_block(nn.Conv3d(256, 256, flat, padding=(0, 1, 1)), 256),
            *_block(nn.Conv3d(256, 256, flat, padding=(0, 1, 1)), 256),
            *_block(nn.Conv3d(256, 256, flat, padding=(0, 1, 1)), 256, nn.MaxPool3d(flat, (1, 2, 2))),
            *_block(nn.Conv3d(256, 512, (1, 6, 6)), 512),
        )

    @staticmethod
    def from_file(path: Path) -> SyncNet:
        """The network with the released weights; raises UserError where the file holds something else."""
        network = SyncNet()
        try:
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise UserError(f"{path}: expected the weights syncnet_v2.model of SyncNet, got {why(error)}") from None
        return network.eval()

    def hear(self, sound: Tensor) -> Tensor:
        """Embeddings [n, 1024] of sound [n, 1, 13, 20]."""
        found: Tensor = self.netfcaud(self.netcnnaud(sound).flatten(1))
        return found

    def see(self, faces: Tensor) -> Tensor:
        """Embeddings [n, 1024] of faces [n, 3, 5, 224, 224], blue first, 0 to 255."""
        found: Tensor = self.netfclip(self.netcnnlip(faces).flatten(1))
        return found

    @torch.inference_mode()
    def judge(self, faces: npt.NDArray[np.uint8], fps: float, sound: npt.NDArray[np.float32]) -> Sync:
        """How well a mouth follows the sound.

        Args:
            faces: uint8 [F, 224, 224, 3] RGB, of one person, as `detect.talking.heads` cuts them out.
            fps: of them; read at 25 per second, the nearest frame each.
            sound: float32 [samples] at 16 kHz from the time of frame 0 on, full scale at 1.

        Raises:
            UserError: less than a second of both.
        """
        count = min(int(len(faces) / fps * FPS), len(sound) * FPS // SPEECH_RATE)
        if count < FPS:
            raise UserError(f"SyncNet: needs a second of pictures and sound, got {count / FPS:.2f} s.")
        nearest = np.minimum(np.round(np.arange(count) / FPS * fps).astype(int), len(faces) - 1)
        blue_first = torch.from_numpy(np.ascontiguousarray(faces[nearest][..., ::-1].transpose(3, 0, 1, 2)))
        cepstra = torch.from_numpy(mfcc(np.round(sound * 32767.0)).T.astype(np.float32))
        device = next(self.parameters()).device
        windows = min(count - WINDOW, (cepstra.shape[1] - 4 * WINDOW) // 4)
        seen, heard = [], []
        for first in range(0, windows, BATCH):
            span = range(first, min(windows, first + BATCH))
            pictures = torch.stack([blue_first[:, i : i + WINDOW] for i in span]).to(device)
            seen.append(self.see(pictures.float()))
            pieces = torch.stack([cepstra[None, :, 4 * i : 4 * i + 4 * WINDOW] for i in span]).to(device)
            heard.append(self.hear(pieces))
        return _sync(torch.cat(seen), torch.cat(heard))


def _sync(seen: Tensor, heard: Tensor) -> Sync:
    """Distances over shifts, the sound filled up with zeros at both ends as the authors have it."""
    padded = nn.functional.pad(heard, (0, 0, SHIFTS, SHIFTS))
    by_shift = [
        nn.functional.pairwise_distance(seen, padded[shift : shift + len(seen)]).mean()
        for shift in range(2 * SHIFTS + 1)
    ]
    means = torch.stack(by_shift)
    least, at = means.min(0)
    return Sync(float(means.median() - least), float(least), SHIFTS - int(at))


def mfcc(sound: Any) -> Floats:
    """Mel-frequency cepstral coefficients [n, 13] of 16 kHz sound, with the logarithm of the energy as the first.

    The form of the package python_speech_features (defaults), with which SyncNet was trained.

    Args:
        sound: [samples], 16-bit values.
    """
    signal = np.asarray(sound, np.float64)
    signal = np.concatenate([signal[:1], signal[1:] - PREEMPHASIS * signal[:-1]])
    pieces = 1 if len(signal) <= LENGTH else 1 + -(-(len(signal) - LENGTH) // HOP)
    signal = np.concatenate([signal, np.zeros((pieces - 1) * HOP + LENGTH - len(signal))])
    at = HOP * np.arange(pieces)[:, None] + np.arange(LENGTH)
    power = np.abs(np.fft.rfft(signal[at], BINS)) ** 2 / BINS
    tiny = np.finfo(float).eps
    energy, mel = power.sum(1), power @ _filters().T
    logs = np.log(np.where(mel == 0, tiny, mel))
    n = np.arange(MELS)
    cosines = np.sqrt(2 / MELS) * np.cos(np.pi * np.arange(CEPSTRA)[:, None] * (2 * n + 1) / (2 * MELS))
    cosines[0] = np.sqrt(1 / MELS)
    cepstra = logs @ cosines.T * (1 + LIFTER / 2 * np.sin(np.pi * np.arange(CEPSTRA) / LIFTER))
    cepstra[:, 0] = np.log(np.where(energy == 0, tiny, energy))
    found: Floats = cepstra
    return found


def _filters() -> Floats:
    """Triangles [26, 257] over the bins of the spectrum, evenly spread on the mel scale."""
    highest = 2595 * np.log10(1 + SPEECH_RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, highest, MELS + 2) / 2595) - 1)
    edges = np.floor((BINS + 1) * hertz / SPEECH_RATE)
    out = np.zeros((MELS, BINS // 2 + 1))
    for j in range(MELS):
        low, middle, high = edges[j : j + 3].astype(int)
        out[j, low:middle] = (np.arange(low, middle) - low) / max(1, middle - low)
        out[j, middle:high] = (high - np.arange(middle, high)) / max(1, high - middle)
    return out
