# SPDX-License-Identifier: Apache-2.0
"""Ops of talkingdit with their CUDA kernels, compiled for the host and run thread by thread.

The fixture `device` is there for tests in this folder and in tests/ops, where every op has its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from emulator import build, compiler
from torch import Tensor

import talkingdit.ops  # noqa: F401  (its modules are patched)


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    return build()


class Device:
    """Makes tensors whose surroundings cannot be touched, and runs functions under every order of threads."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.memory: list[Any] = []

    def empty(self, *shape: Any, dtype: torch.dtype | None = None, device: Any = None, align: int = 16) -> Tensor:
        """Like torch.empty, filled with NaN, between pages that trap."""
        sizes = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        dtype = dtype or torch.get_default_dtype()
        if sizes.numel() == 0:
            return torch.zeros(sizes, dtype=dtype)
        memory = self.module.GuardedMemory(sizes.numel() * dtype.itemsize, max(align, dtype.itemsize))
        self.memory.append(memory)
        return torch.frombuffer(memory, dtype=dtype).view(sizes)

    def put(self, value: Tensor, align: int = 16) -> Tensor:
        """A copy of the tensor in such memory."""
        return self.empty(value.shape, dtype=value.dtype, align=align).copy_(value.detach())

    def orders(self, run: Callable[[], Any]) -> list[Tensor]:
        """Results of ``run``, which must be the same, bit by bit, however threads take turns."""
        results = []
        for schedule in ("ascending", "descending", "shuffled"):
            self.module.set_schedule(getattr(self.module.Schedule, schedule))
            results.append([t.detach().clone() for t in torch.utils._pytree.tree_leaves(run())])
            assert all(memory.intact() for memory in self.memory), "wrote behind the end of a tensor"
            self.memory.clear()
        self.module.set_schedule(self.module.Schedule.ascending)
        for others in results[1:]:
            for first, other in zip(results[0], others, strict=True):
                assert torch.equal(first.nan_to_num(nan=12345.0), other.nan_to_num(nan=12345.0)), "a race"
        return results[0]

    def compare(
        self,
        op: Callable[..., Any],
        reference: Callable[..., Any],
        inputs: Sequence[Tensor],
        align: int = 16,
        place: Callable[[Tensor], Tensor] | None = None,
        gradients: bool = True,
    ) -> None:
        """Results and gradients of an op in every order of threads, against the reference in float64."""
        place = place or (lambda value: self.put(value, align))
        ours = self.orders(lambda: _with_gradients(op, [place(x) for x in inputs], gradients, place))
        truth = _with_gradients(reference, [x.double() for x in inputs], gradients, lambda value: value)
        for index, (a, b) in enumerate(zip(ours, truth, strict=True)):
            assert a.isfinite().all(), f"result {index} was not written everywhere, or read what nobody wrote"
            error = float((a.double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))
            assert error < TOLERANCE[a.dtype], f"result {index}: relative error {error:.2g}"


TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def _with_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], gradients: bool, place: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    leaves = [x.requires_grad_(gradients) for x in inputs]
    results = torch.utils._pytree.tree_leaves(function(*leaves))
    if not gradients:
        return results
    generator = torch.Generator().manual_seed(3)
    # Rounded to the type of the op's result, so that both get the same.
    probes = [torch.randn(r.shape, generator=generator).bfloat16().to(r.dtype) for r in results]
    return [*results, *torch.autograd.grad(results, leaves, [place(p) for p in probes])]


@pytest.fixture
def device(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """While a test uses it, ops run emulated CUDA kernels, and whatever they allocate is guarded and poisoned."""
    device = Device(emulated)
    for name, module in list(sys.modules.items()):
        if name.startswith("talkingdit.ops.") and hasattr(module, "native"):
            monkeypatch.setattr(module, "native", emulated)
    monkeypatch.setattr(torch, "empty", device.empty)
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *shape, dtype=None: device.empty(*shape, dtype=dtype or self.dtype)
    )
    yield device
    emulated.set_schedule(emulated.Schedule.ascending)
