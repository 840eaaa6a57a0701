# SPDX-License-Identifier: Apache-2.0
"""Light-ASD (Liao et al., CVPR 2023): does this face say what is heard, picture by picture.

Its weights, finetuning_TalkSet.model or pretrain_AVA_CVPR.model, are given by the user. It reads grey mouths of 25
pictures a second and four rows of mel-frequency cepstral coefficients for each, and gives a number per picture: above 0
the face speaks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from talkingdit.detect.given import why
from talkingdit.detect.syncnet import CEPSTRA, mfcc
from talkingdit.errors import UserError

FPS = 25
ROWS = 4  # of cepstra per picture
SIDE = 112  # of the mouths
DURATIONS = (1, 2, 3, 4, 5, 6)  # seconds that are read at once; scores are means over these, as the authors have it
REACH = 6  # pictures to both sides that the encoder of pictures sees
MEAN, DEVIATION = 0.4161, 0.1688  # of grey levels in 0..1
CHANNELS = (32, 64, 128)

Scores = npt.NDArray[np.float32]


class _Block(nn.Module):
    """Two paths, of kernels 3 and 5, each first across and then along time; their sum through a 1x1 (section 3.2).

    Args:
        before, after: channels.
        across: letter of the first convolution in the weights' names, "s" of pictures and "m" of sound.
        stride: of the first convolution of pictures.
    """

    def __init__(self, before: int, after: int, across: str, stride: int = 1) -> None:
        super().__init__()
        self._across, pictures = across, across == "s"
        convolution: Any = nn.Conv3d if pictures else nn.Conv2d
        norm: Any = nn.BatchNorm3d if pictures else nn.BatchNorm2d
        for size in (3, 5):
            half = size // 2
            shapes: tuple[tuple[Any, Any, Any], ...]
            if pictures:
                shapes = ((1, size, size), (0, half, half), (1, stride, stride)), ((size, 1, 1), (half, 0, 0), 1)
            else:
                shapes = ((size, 1), (half, 0), 1), ((1, size), (0, half), 1)
            for letter, channels, (kernel, padding, step) in zip((across, "t"), (before, after), shapes, strict=True):
                self.add_module(f"{letter}_{size}", convolution(channels, after, kernel, step, padding, bias=False))
                self.add_module(f"bn_{letter}_{size}", norm(after, eps=1e-3))
        self.last = convolution(after, after, 1, bias=False)
        self.bn_last = norm(after, eps=1e-3)

    def _step(self, x: Tensor, name: str) -> Tensor:
        found: Tensor = self.get_submodule(f"bn_{name}")(self.get_submodule(name)(x))
        return found.relu_()

    def forward(self, x: Tensor) -> Tensor:
        paths = [self._step(self._step(x, f"{self._across}_{size}"), f"t_{size}") for size in (3, 5)]
        return self._step(paths[0] + paths[1], "last")


class _Encoder(nn.Module):
    """Three blocks with a pool after the first two: over the picture, or over time, for four rows belong to one."""

    def __init__(self, across: str) -> None:
        super().__init__()
        pictures = across == "s"
        kernel, stride, padding = ((1, 3, 3), (1, 2, 2), (0, 1, 1)) if pictures else ((1, 1, 3), (1, 1, 2), (0, 0, 1))
        first, second, third = CHANNELS
        self.block1 = _Block(1, first, across, 2 if pictures else 1)
        self.pool1 = nn.MaxPool3d(kernel, stride, padding)
        self.block2 = _Block(first, second, across)
        self.pool2 = nn.MaxPool3d(kernel, stride, padding)
        self.block3 = _Block(second, third, across)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.block3(self.pool2(self.block2(self.pool1(self.block1(x)))))
        return found


class _Recurrent(nn.Module):
    """One direction after the other, the second reading what the first has made (section 3.3)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gru_forward = nn.GRU(size, size, batch_first=True)
        self.gru_backward = nn.GRU(size, size, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        ahead = nn.functional.gelu(self.gru_forward(x)[0])
        back: Tensor = self.gru_backward(ahead.flip(1))[0]
        return nn.functional.gelu(back.flip(1))


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visualEncoder = _Encoder("s")
        self.audioEncoder = _Encoder("m")
        self.GRU = _Recurrent(CHANNELS[-1])


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.FC = nn.Linear(CHANNELS[-1], 2)


class LightASD(nn.Module):
    """The network; names of its parts are those of the released weights.

    The second head of these, which reads the face without the sound and serves their training, is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = _Network()
        self.lossAV = _Head()

    @staticmethod
    def from_file(path: Path) -> LightASD:
        """The network with the released weights; raises UserError where the file holds something else."""
        network = LightASD()
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            weights = {name.removeprefix("module."): value for name, value in found.items()}
            network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("lossV.")})
        except Exception as error:
            raise UserError(
                f"{path}: expected the weights finetuning_TalkSet.model or pretrain_AVA_CVPR.model of Light-ASD, "
                f"got {why(error)}"
            ) from None
        return network.eval()

    def see(self, mouths: Tensor) -> Tensor:
        """Features [B, T, 128] of grey mouths [B, T, 112, 112], 0 to 255."""
        pixels = (mouths[:, None].float() / 255 - MEAN) / DEVIATION
        found: Tensor = self.model.visualEncoder(pixels).amax((-2, -1)).transpose(1, 2)
        return found

    def decide(self, seen: Tensor, cepstra: Tensor) -> Tensor:
        """Scores [B, T] of features [B, T, 128] and cepstra [B, 4 T, 13]: logits of the class "speaks"."""
        heard = self.model.audioEncoder(cepstra.transpose(1, 2)[:, None]).mean(2).transpose(1, 2)
        found: Tensor = self.lossAV.FC(self.model.GRU(seen + heard))
        return found[..., 1]

    def forward(self, mouths: Tensor, cepstra: Tensor) -> Tensor:
        """Scores [B, T] of mouths and cepstra as `see` and `decide` take them."""
        return self.decide(self.see(mouths), cepstra)

    @torch.inference_mode()
    def judge(self, mouths: npt.NDArray[np.uint8], fps: float, sound: npt.NDArray[np.float32]) -> Scores:
        """Scores of a face: the clip is read in pieces of 1 to 6 seconds, and the six scores of a picture averaged.

        Args:
            mouths: uint8 [F, 112, 112], as `detect.talking.mouths` cuts them out.
            fps: of them; read at 25 per second, the nearest each.
            sound: float32 [samples] at 16 kHz from the time of picture 0 on, full scale at 1.

        Returns:
            float32 [F]; where the sound has ended, the last score goes on.

        Raises:
            UserError: not as much as one picture of both.
        """
        device = self.lossAV.FC.weight.device
        rows = mfcc(np.round(sound * 32767.0)).astype(np.float32)
        count = min(round(len(mouths) / fps * FPS), len(rows) // ROWS)
        if count < 1:
            raise UserError(f"Light-ASD: needs {1 / FPS} s of pictures and sound, got less.")
        nearest = np.minimum(np.round(np.arange(count) / FPS * fps).astype(int), len(mouths) - 1)
        seen = _Seen(self, torch.from_numpy(mouths[nearest]).to(device))
        heard = torch.from_numpy(rows[: count * ROWS]).reshape(count, ROWS, CEPSTRA).to(device)
        total = torch.zeros(count, device=device)
        for duration in DURATIONS:
            for first in range(0, count, duration * FPS):
                part = slice(first, min(count, first + duration * FPS))
                total[part] += self.decide(seen.part(part.start, part.stop)[None], heard[part].flatten(0, 1)[None])[0]
        scores = (total / len(DURATIONS)).cpu().numpy()
        at = np.round(np.arange(len(mouths)) / fps * FPS).astype(int)
        found: Scores = scores[np.minimum(at, count - 1)].astype(np.float32)
        return found


class _Seen:
    """Features of a clip as if it were cut at some second.

    The encoder sees REACH pictures to both sides, and nothing beyond a cut. So features that are not close to a cut are
    those of the whole clip, and those that are follow from the pictures close to it: all durations together cost twice
    as much as one, and not six times.
    """

    def __init__(self, network: LightASD, mouths: Tensor) -> None:
        self._network, self._mouths = network, mouths
        step, count = max(DURATIONS) * FPS, len(mouths)
        self._whole = torch.cat([self._see(i, min(count, i + step), 0, count) for i in range(0, count, step)])
        self._edges: dict[int, tuple[Tensor, Tensor]] = {}

    def part(self, first: int, last: int) -> Tensor:
        """Features [last - first, 128] of a piece that begins and ends at full seconds, or with the clip."""
        found, count = self._whole[first:last].clone(), len(self._mouths)
        if last < count:
            found[-REACH:] = self._edge(last)[0]
        if first > 0:
            found[:REACH] = self._edge(first)[1]
        return found

    def _edge(self, at: int) -> tuple[Tensor, Tensor]:
        """Features just before and behind a cut."""
        if at not in self._edges:
            count = len(self._mouths)
            behind = self._see(at, min(count, at + REACH), at, count)
            self._edges[at] = self._see(at - REACH, at, 0, at), behind
        return self._edges[at]

    def _see(self, first: int, last: int, low: int, high: int) -> Tensor:
        """Features of pictures first to last where there is nothing outside of low to high."""
        begin, end = max(low, first - REACH), min(high, last + REACH)
        return self._network.see(self._mouths[None, begin:end])[0, first - begin : last - begin]
