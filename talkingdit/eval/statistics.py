# SPDX-License-Identifier: Apache-2.0
"""How sure a mean is, and whether two systems differ: bootstrap intervals and paired tests over videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

DRAWS = 2000
CONFIDENCE = 0.95
EXACT = 14  # videos up to which every assignment of signs is tried
FLIPS = 20000


@dataclass(frozen=True)
class ConfidenceInterval:
    """A mean with its confidence interval; both ends are the mean where there is one value."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """What two systems differ by over the videos that both have.

    Attributes:
        mean, low, high: of first minus second, with its bootstrap interval.
        p: of the sign-flip test, two-sided; 1 where nothing differs.
        n: videos.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int


def interval(values: Sequence[float], seed: int = 0, draws: int = DRAWS) -> ConfidenceInterval:
    """Mean and 95 % percentile bootstrap interval (Efron 1979) over videos.

    Raises:
        ValueError: no values.
    """
    given = np.asarray(values, np.float64)
    if not len(given):
        raise ValueError("interval: values must not be empty")
    low, high = _bounds(lambda chosen: given[chosen].mean(1), len(given), seed, draws)
    return ConfidenceInterval(float(given.mean()), low, high, len(given))


def interval_of(
    statistic: Callable[[npt.NDArray[np.int64]], float], n: int, seed: int = 0, draws: int = 200
) -> tuple[float, float]:
    """Interval of a statistic of whole videos: it is given indices of videos, drawn with replacement."""
    return _bounds(lambda chosen: np.array([statistic(one) for one in chosen]), n, seed, draws)


def _bounds(means: Callable[[Any], FloatArray], n: int, seed: int, draws: int) -> tuple[float, float]:
    chosen = np.random.default_rng(seed).integers(0, n, (draws, n))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means(chosen), [tail, 1 - tail])
    return float(low), float(high)


def difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Difference:
    """Paired comparison of two systems on the same videos.

    The test flips the signs of the differences (Fisher 1935): all 2^n ways up to 14 videos, 20,000 random ways above.

    Raises:
        ValueError: not as many values, or none.
    """
    gaps = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if gaps.ndim != 1 or not len(gaps):
        raise ValueError(f"difference: expected two equally long lists, got {len(first)} and {len(second)} values")
    around = interval(gaps.tolist(), seed)
    return Difference(around.mean, around.low, around.high, _sign_flip(gaps, seed), len(gaps))


def _sign_flip(gaps: FloatArray, seed: int) -> float:
    n, seen = len(gaps), abs(gaps.sum())
    slack = 1e-12 * np.abs(gaps).sum()
    if n <= EXACT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ gaps) >= seen - slack).mean())
    signs = np.random.default_rng(seed).choice((-1, 1), (FLIPS, n))
    return float((1 + (np.abs(signs @ gaps) >= seen - slack).sum()) / (FLIPS + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, adjusted so that the chance of any false alarm stays what it is (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted
