# SPDX-License-Identifier: Apache-2.0
"""The emulation notices mistakes: a test that runs kernels through it can fail."""

from __future__ import annotations

import pytest
import torch
from emulated_device import Device

N = 64


def run(device: Device, fault: int) -> torch.Tensor:
    def once() -> torch.Tensor:
        x, out = device.put(torch.arange(N, dtype=torch.float32)), device.empty(N)
        device.module.run_faulty(x, out, fault)
        return out

    return device.orders(once)[0]


def test_a_sound_kernel_gives_the_right_sums(device: Device) -> None:
    x = torch.arange(N, dtype=torch.float32)
    expected = (x.roll(1) + x.roll(-1)).view(2, 32).sum(1).repeat_interleave(32)
    torch.testing.assert_close(run(device, 0), expected)


def test_a_missing_barrier_is_a_race(device: Device) -> None:
    with pytest.raises(AssertionError, match="a race"):
        run(device, 1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (2, r"faulty: access outside memory at 0x\w+, block \(0, 0, 0\), thread \(5, 0, 0\)"),
        (3, "access outside memory .* thread"),
        (4, "access outside memory"),
        (5, "misaligned access"),
        (6, "not all lanes come to"),
        (7, "not all threads come to a barrier|not all lanes"),
        (8, "not all lanes come to|come to __shfl_sync and"),
        (9, "integer overflow"),
        (10, "launch with threads = 1056"),
        (11, "233472 bytes|invalid value"),
        (12, "launch with gridDim.y = 65536"),
    ],
)
def test_other_mistakes_say_what_and_where(device: Device, fault: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(device, fault)


def test_memory_that_nobody_wrote_is_not_a_number(device: Device) -> None:
    assert device.empty(3, 5).isnan().all()
    assert device.empty(7, dtype=torch.bfloat16).isnan().all()
