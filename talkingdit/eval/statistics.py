# SPDX-License-Identifier: Apache-2.0
"""How sure a mean is, and whether two systems differ: bootstrap intervals and paired tests over videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

DRAWS = 2000
CONFIDENCE = 0.95
EXACT = 14  # videos up to which every assignment of signs is tried
FLIPS = 20000
BLOCK = 1 << 20  # random numbers that are held at once


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

    Plain percentiles are too close for few videos: of 5 from a normal distribution they hold the true mean 86 times of
    100. They are moved out as Student's t and the variance over n - 1 ask for (Hesterberg 2015, section 5.3).

    Raises:
        ValueError: no values.
    """
    given = np.asarray(values, np.float64)
    if not len(given):
        raise ValueError("interval: values must not be empty")
    low, high, _ = _bounds(lambda chosen: given[chosen].mean(1), len(given), seed, draws)
    return ConfidenceInterval(float(given.mean()), low, high, len(given))


def interval_of(
    statistic: Callable[[npt.NDArray[np.int64]], float], n: int, seed: int = 0, draws: int = 200
) -> tuple[float, float]:
    """Interval of a statistic of whole videos: it is given indices of videos, drawn with replacement.

    A draw has fewer different videos than the set, which raises distances of sets. The percentiles are therefore moved
    by the gap between the draws' mean and the statistic of the set, around which they lie then.
    """
    low, high, mean = _bounds(lambda chosen: np.array([statistic(one) for one in chosen]), n, seed, draws)
    gap = statistic(np.arange(n)) - mean
    return low + gap, high + gap


def _bounds(means: Callable[[Any], FloatArray], n: int, seed: int, draws: int) -> tuple[float, float, float]:
    """Both ends of what is drawn, and its mean; drawn in blocks, so that memory does not grow with the draws."""
    generator, block = np.random.default_rng(seed), max(1, BLOCK // n)
    drawn = np.concatenate(
        [means(generator.integers(0, n, (min(block, draws - done), n))) for done in range(0, draws, block)]
    )
    tail = _tail(n)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high), float(drawn.mean())


@lru_cache(maxsize=64)
def _tail(n: int) -> float:
    """Share of draws to leave out at each end, for n videos."""
    if n < 2:
        return (1 - CONFIDENCE) / 2
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, n - 1) < CONFIDENCE else (low, middle)
    return 0.5 * math.erfc(high * math.sqrt(n / (n - 1)) / math.sqrt(2))


def _within(t: float, freedom: int) -> float:
    """Probability that Student's t lies between -t and t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine, odd = math.sin(angle), math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


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
    generator, block, as_far = np.random.default_rng(seed), max(1, BLOCK // n), 0
    for done in range(0, FLIPS, block):
        signs = generator.choice((-1, 1), (min(block, FLIPS - done), n))
        as_far += int((np.abs(signs @ gaps) >= seen - slack).sum())
    return (1 + as_far) / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, adjusted so that the chance of any false alarm stays what it is (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted
