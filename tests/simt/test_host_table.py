# SPDX-License-Identifier: Apache-2.0
"""Tables of the host reach the device whole, whatever their length."""

from __future__ import annotations

import pytest
import torch
from emulated_device import Device


@pytest.mark.parametrize("length", [1, 479, 480, 481, 1500])
def test_every_value_arrives(device: Device, length: int) -> None:
    values = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).view(torch.int64)

    def run() -> torch.Tensor:
        out = device.empty(length, dtype=torch.int64)
        device.module.host_table(out, values)
        return out

    assert torch.equal(device.orders(run)[0], values)


def test_tables_of_another_length_are_refused(device: Device) -> None:
    with pytest.raises(ValueError, match="one length"):
        device.module.host_table(torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
