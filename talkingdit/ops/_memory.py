# SPDX-License-Identifier: Apache-2.0
"""Allocation of results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from talkingdit._native_loader import native

_LARGE = 4 << 20
# As DLPack has them: kind and bits.
_CODES = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int8: (0, 8),
}


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty`` on the device of ``like``, with its dtype unless told otherwise.

    A large result on the CPU costs more in page faults than in arithmetic: it is made of huge pages, and of those of an
    earlier result where one is no longer in use. Of these a 32nd of the machine's memory is kept at most.
    """
    dtype = dtype or like.dtype
    code = _CODES.get(dtype)
    if like.device.type != "cpu" or code is None or math.prod(shape) * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype, device=like.device)
    made = native.fresh_result(list(shape), *code)
    return torch.empty(shape, dtype=dtype) if made is None else torch.from_dlpack(made)
