# SPDX-License-Identifier: Apache-2.0
"""What tests of ops compare: results and gradients, and how far they are from the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from talkingdit import build_info

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def usable_isas() -> list[str]:
    """The instruction sets that this build has and this processor can run, the smallest first."""
    info = build_info()
    built: list[str] = info["cpu_isa_built"]
    return built[: built.index(info["cpu_isa"]) + 1]


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, as a share of that of ``b``."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def with_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Results, and the gradients of all inputs for the same random gradient of the results."""
    leaves = [v.detach().clone().requires_grad_() for v in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    probe = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=probe, dtype=torch.float64).to(o.device) for o in outputs]
    loss = sum((o.double() * weight).sum() for o, weight in zip(outputs, weights, strict=True))
    return [v.detach() for v in (*outputs, *torch.autograd.grad(loss, leaves, materialize_grads=True))]
