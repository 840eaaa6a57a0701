# SPDX-License-Identifier: Apache-2.0
"""Strengths of guidance over the denoising steps: constant, along a line or a cosine, on an interval, or dynamic.

A schedule is called with a step (0 is the first, noisiest) and the number of steps, and gives the strength of that
step. In words, for the command line and configuration files:

    4.5                 constant
    linear:5:1          from 5 in the first step to 1 in the last
    cosine:5:1          the same along half a cosine
    interval:3@0.2-0.8  3 in steps from 20 % to 80 % of all, 1 (no guidance) in the others
    dynamic:4           from 4 down to 2, early (EchoMimicV3)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int, int], float]


@dataclass(frozen=True)
class Constant:
    """The same strength in every step."""

    value: float

    def __call__(self, step: int, steps: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """From `first` in the first step to `last` in the last one, in equal steps (Sonic)."""

    first: float
    last: float

    def __call__(self, step: int, steps: int) -> float:
        return self.first + (self.last - self.first) * _share(step, steps)


@dataclass(frozen=True)
class Cosine:
    """From `first` to `last` along half a cosine: slow at both ends."""

    first: float
    last: float

    def __call__(self, step: int, steps: int) -> float:
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * _share(step, steps))) / 2


@dataclass(frozen=True)
class Interval:
    """`value` in the steps from `begin` to `end`, as shares of all, and `outside` in the others (arXiv:2404.07724).

    Of S steps these are begin S <= step < end S: 0.2-0.8 of ten are the steps 2 to 7, counted from 0.
    """

    value: float
    begin: float
    end: float
    outside: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(f"guidance: an interval must be 0 <= begin <= end <= 1, got {self.begin} and {self.end}")

    def __call__(self, step: int, steps: int) -> float:
        return self.value if self.begin * steps <= step < self.end * steps else self.outside


@dataclass(frozen=True)
class Dynamic:
    """g / 2 + g / 4 (1 - cos(pi ((S - i) / S)^power)): falls from g to g / 2 (the dynamic guidance of EchoMimicV3)."""

    value: float
    power: float = 5.0

    def __call__(self, step: int, steps: int) -> float:
        left = ((steps - step) / steps) ** self.power
        return self.value / 2 + self.value / 4 * (1 - math.cos(math.pi * left))


def parse(words: str) -> Schedule:
    """A schedule in words, see above.

    Raises:
        ValueError: the words are none.
    """
    name, _, rest = words.partition(":")
    try:
        if not rest:
            return Constant(_finite(name))
        if name in ("linear", "cosine"):
            first, last = (_finite(value) for value in rest.split(":"))
            return Linear(first, last) if name == "linear" else Cosine(first, last)
        if name == "interval":
            value, _, share = rest.partition("@")
            return Interval(_finite(value), *read_interval(share))
        if name == "dynamic":
            return Dynamic(_finite(rest))
    except ValueError as error:
        raise ValueError(f"{_EXPECTED}, got {words!r}") from error
    raise ValueError(f"{_EXPECTED}, got {words!r}")


ALL_STEPS = (0.0, 1.0)


def read_interval(words: str) -> tuple[float, float]:
    """Begin and end of an `Interval` in words, BEGIN-END: "0.2-0.8".

    Raises:
        ValueError: something else.
    """
    begin, _, end = words.partition("-")
    try:
        shares = _finite(begin), _finite(end)
        Interval(1.0, *shares)
    except ValueError as error:
        raise ValueError(
            f"must be BEGIN-END, shares of the steps with 0 <= BEGIN <= END <= 1, such as 0.2-0.8, got {words!r}"
        ) from error
    return shares


_EXPECTED = "must be a number, linear:A:B, cosine:A:B, interval:G@BEGIN-END with shares of the steps, or dynamic:G"


def schedule(strength: float | Schedule) -> Schedule:
    """A schedule of a number or of a schedule."""
    return strength if callable(strength) else Constant(float(strength))


def _share(step: int, steps: int) -> float:
    return step / (steps - 1) if steps > 1 else 0.0


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
