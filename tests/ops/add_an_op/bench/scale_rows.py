# SPDX-License-Identifier: Apache-2.0
"""scale_rows against a multiplication."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import Benchmark, Case, Rand, SmallCase, size
from talkingdit import ops

SHAPES = {"cpu": [(6240, 1536)], "cuda": [(32760, 5120)], "quick": [(8, 32)]}


def cases(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(*shape, device=device, dtype=dtype),)

    for direction in ("forward", "backward"):
        yield Case(
            "scale_rows",
            f"{shape[0]}x{shape[1]}",
            shape[0],
            dtype,
            direction,
            bytes=2 * size(*inputs()),
            inputs=inputs,
            ours=lambda x, out=None: ops.scale_rows(x, 0.5, out=out),
            baselines={"eager": lambda x: ops.scale_rows_reference(x, 0.5)},
        )


def small(rand: Rand) -> Iterator[SmallCase]:
    yield SmallCase(
        "scale_rows", lambda x: ops.scale_rows(x, 0.5), lambda x: ops.scale_rows_reference(x, 0.5), (rand(5, 37),)
    )


BENCH = Benchmark(SHAPES, cases, small)
