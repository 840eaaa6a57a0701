# SPDX-License-Identifier: Apache-2.0
"""What a file of benchmarks gives: its ``BENCH``. Files of this folder that have one are found, not listed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.shapes import TokenShape

_FOLDER = Path(__file__).resolve().parent
OURS = ("general", "cutlass")  # contestants that are kernels of ours, timed beside the one that is chosen

Rand = Callable[..., Tensor]  # rand(2, 3) draws a tensor [2, 3] of the dtype and on the device that are asked for


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        inputs: makes a fresh set of tensors.
        ours: the op, called as ``ours(*inputs)`` and, going forward, ``ours(*inputs, out=...)``.
        baselines: others of the same signature without ``out``.
        compiled: the baseline to compile, or None.
        optional: baselines that a device may refuse; they are then left out, with the reason.
        fused: baselines that are only fast when compiled, and are never run in another way.
        direction: "backward" times the gradients of all inputs alone; "forward" and "step" time the call.
        has_out: whether the op takes a preallocated result.
        rounding: relative error that the op has by what it does, beyond that of the dtype.
    """

    op: str
    shape: str
    tokens: int
    dtype: torch.dtype
    direction: str
    bytes: int
    inputs: Callable[[], tuple[Tensor, ...]]
    ours: Callable[..., Any]
    baselines: Mapping[str, Callable[..., Any]]
    compiled: Callable[..., Any] | None = None
    has_out: bool = True
    optional: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    fused: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    rounding: float = 0.0


@dataclass(frozen=True)
class SmallCase:
    """``op(*inputs)`` must give what ``reference(*inputs)`` gives in float64, as must the gradients of all inputs.

    Attributes:
        inputs: such as reach whole vectors of a kernel as well as their rest.
        gradients: the op has them.
        compile: also try it under ``torch.compile(fullgraph=True)`` on a GPU.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    gradients: bool = True
    compile: bool = False


@dataclass(frozen=True)
class LargeCase:
    """``op(*inputs)`` on inputs whose last element lies beyond 2^31, every sample of the batch on its own."""

    name: str
    op: Callable[..., Any]
    inputs: tuple[Tensor, ...]


def _none(*_: Any) -> Iterator[Any]:
    return iter(())


@dataclass(frozen=True)
class Benchmark:
    """What is known of an op here.

    Attributes:
        shapes: those that are measured, by "cpu", "cuda" and "quick" (a tiny one, to try the code with).
        cases: rows of a shape, for a dtype on a device.
        small: a small case per kernel, with tensors from the given function.
        large: large cases of a shape; ``rand(N, ...)`` draws [batch, N, ...].
        block: it is a whole block, bound by matrix products: times are compared, bandwidths mean nothing.
        early: on a GPU it is measured before anything that takes long.
        headline: the op whose row stands in the README, if one does.
    """

    shapes: Mapping[str, Sequence[Any]]
    cases: Callable[[Any, torch.dtype, torch.device], Iterator[Case]]
    small: Callable[[Rand], Iterator[SmallCase]] = _none
    large: Callable[[TokenShape, Rand], Iterator[LargeCase]] = _none
    block: bool = False
    early: bool = False
    headline: str = ""


@cache
def names() -> tuple[str, ...]:
    """Files that have a ``BENCH``, in order. They are read, not imported: some import what takes long to load."""
    files = sorted(_FOLDER.glob("*.py"))
    return tuple(file.stem for file in files if re.search(r"^BENCH\b", file.read_text(encoding="utf-8"), re.MULTILINE))


def load(name: str) -> Benchmark:
    """The ``BENCH`` of a file."""
    found: Benchmark = importlib.import_module(f"bench.{name}").BENCH
    return found


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(t.nbytes for t in tensors)


def small_cases(dtype: torch.dtype, device: torch.device) -> Iterator[SmallCase]:
    """Of every op. Fresh inputs every time; the same ones for the same seed."""

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for name in names():
        yield from load(name).small(rand)


def large_cases(device: torch.device, tiny: bool = False) -> Iterator[LargeCase]:
    """Of every op, in bfloat16, [6, 80,000 tokens, 40 heads, 128]: 2.5e9 elements."""
    batch, heads, dim, grid = (2, 2, 32, (3, 4, 5)) if tiny else (6, 40, 128, (20, 50, 80))
    shape = TokenShape("large", [(0, grid)], heads=heads, dim=dim)

    def rand(*sizes: int) -> Tensor:
        return torch.randn(batch, *sizes, device=device, dtype=torch.bfloat16)

    for name in names():
        yield from load(name).large(shape, rand)
