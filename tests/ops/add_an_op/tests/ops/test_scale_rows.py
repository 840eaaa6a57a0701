# SPDX-License-Identifier: Apache-2.0
"""Rows times a number, against float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import DTYPES, relative, with_gradients
from emulated_device import Device

from talkingdit import ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_eager(dtype: torch.dtype) -> None:
    inputs = [torch.randn(5, 37).to(dtype)]
    exact = with_gradients(lambda x: ops.scale_rows_reference(x, 0.3), [x.double() for x in inputs])
    eager = with_gradients(lambda x: ops.scale_rows_reference(x, 0.3), inputs)
    for a, b, truth in zip(with_gradients(lambda x: ops.scale_rows(x, 0.3), inputs), eager, exact, strict=True):
        assert relative(a, truth) <= 2 * relative(b, truth) + 4 * torch.finfo(torch.float64).eps


def test_opcheck() -> None:
    x = torch.randn(5, 37, requires_grad=True)
    torch.library.opcheck(torch.ops.talkingdit.scale_rows.default, (x, 0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_cuda_kernels(device: Device, dtype: torch.dtype) -> None:
    x = torch.randn(5, 37).to(dtype)
    device.compare(lambda x: ops.scale_rows(x, 0.5), lambda x: ops.scale_rows_reference(x, 0.5), [x])
