# SPDX-License-Identifier: Apache-2.0
"""Small tables of the host on the device of an op's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from talkingdit._native_loader import native


def on_device(values: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values of the host as int64 or float64 (8 bytes each) on a device; tensors that are on one already are cast.

    On CUDA they travel as parameters of a kernel: nothing is synchronised, and inside a CUDA graph's capture, where a
    copy from pageable memory is forbidden, the graph keeps them.
    """
    if isinstance(values, Tensor) and values.device.type != "cpu":
        return values.to(device, dtype, non_blocking=True)
    table = torch.as_tensor(values, dtype=dtype)
    if device.type == "cpu" or torch.compiler.is_compiling():
        return table.to(device)
    out = torch.empty(table.shape, dtype=dtype, device=device)
    if type(out) is not Tensor:  # fake tensors have no memory
        return table.to(device)
    if table.numel():
        native.host_table(out.view(torch.int64).flatten(), table.contiguous().view(torch.int64).flatten())
    return out
