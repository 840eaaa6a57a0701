# SPDX-License-Identifier: Apache-2.0
"""Devices other than the usual one: a second one, and one whose blocks have less shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from emulated_device import Device

from talkingdit import ops

NONE = -1


@pytest.mark.parametrize(
    ("before", "device", "inside"),
    [
        ((False, False, NONE), 1, (False, True, 1)),  # nothing was used yet: nothing is made on device 0
        ((False, True, NONE), 1, (False, True, 1)),
        ((True, False, 0), 0, (True, False, 0)),
        ((True, False, 0), 1, (True, True, 1)),
        ((True, True, 1), 0, (True, True, 0)),
    ],
)
def test_a_launch_on_a_device_leaves_the_others_alone(
    emulated: ModuleType, before: tuple[bool, bool, int], device: int, inside: tuple[bool, bool, int]
) -> None:
    emulated.set_contexts(*before)
    within, after = emulated.guard(device)
    emulated.set_contexts(False, False, NONE)
    assert within == inside
    assert after == (*inside[:2], before[2])  # the same is current, and no context more than the launch needed


def test_a_device_that_is_not_there_is_an_error_and_changes_nothing(emulated: ModuleType) -> None:
    emulated.set_contexts(True, False, 0)
    with pytest.raises(RuntimeError, match="cudaSetDevice"):
        emulated.guard(7)
    assert emulated.guard(0) == ((True, False, 0), (True, False, 0))
    emulated.set_contexts(False, False, NONE)


@pytest.fixture
def small(device: Device) -> Iterator[Device]:
    """99 KB of shared memory for a block, as sm_86, sm_89 and sm_120 have."""
    device.module.set_shared_limit(99 << 10)
    yield device
    device.module.set_shared_limit(227 << 10)


def modulation(count: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(1, count, dim, generator=torch.Generator().manual_seed(seed)).to(dtype) * 0.1


@pytest.mark.parametrize("which", ["norm", "both"])
def test_wide_float64_rows_fit_a_small_device(small: Device, which: str) -> None:
    dim, wide = 13000, torch.float64
    x, y = (modulation(3, dim, wide, seed) * 10 for seed in (1, 2))
    gate, scale, shift = (modulation(2, dim, wide, seed) for seed in (3, 4, 5))
    name = "norm_modulate" if which == "norm" else "gate_residual_norm_modulate"
    inputs = [x, scale, shift] if which == "norm" else [x, y, gate, scale, shift]
    small.compare(
        lambda *v: getattr(ops, name)(*v, [1, 3]), lambda *v: getattr(ops, f"{name}_reference")(*v, [1, 3]), inputs
    )


def test_float32_rows_with_16_bit_layers_fit_a_small_device(small: Device) -> None:
    dim = 5120
    x, y = modulation(4, dim, torch.float32, 1) * 10, modulation(4, dim, torch.bfloat16, 2)
    inputs = [x, y, *(modulation(2, dim, torch.float32, seed) for seed in (3, 4, 5))]
    small.compare(
        lambda *v: ops.gate_residual_norm_modulate(*v, 2, dtype=torch.bfloat16),
        lambda *v: ops.gate_residual_norm_modulate_reference(*v, 2),
        inputs,
    )
