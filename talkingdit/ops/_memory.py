# SPDX-License-Identifier: Apache-2.0
"""Allocation of results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from talkingdit._native_loader import native

_LARGE = 4 << 20


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty`` on the device of ``like``, with its dtype unless told otherwise.

    A large result on the CPU costs more in page faults than in arithmetic, so the kernel is asked for huge pages.
    """
    out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if out.device.type == "cpu" and out.nbytes >= _LARGE:
        native.advise_huge_pages(out)
    return out
