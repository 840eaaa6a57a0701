# SPDX-License-Identifier: Apache-2.0
"""A call that the compiler leaves out of its graphs. Whoever imports this brings in the compiler: see `eager`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@torch.compiler.disable(reason="collectives must be issued in the same order on all ranks")
def call(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function(*args, **kwargs)`"""
    return function(*args, **kwargs)
