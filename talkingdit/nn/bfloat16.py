# SPDX-License-Identifier: Apache-2.0
"""Where bfloat16 is worth computing in.

A processor without instructions for it has to widen every number. PyTorch does not widen whole products: they take
many times as long there as in float32 (`findings/bfloat16_products_avx2.sh`), and training steps with them
(`bench/results/cpu-avx2-puppet_steps.json`). So what can choose its dtype chooses float32 (`multiplies_bfloat16`,
`bfloat16_products`), and large models that are in bfloat16 to need less memory widen a layer at a time
(`fast_products`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from talkingdit._native_loader import build_info


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster on this device than those of float32."""
    return device.type == "cuda" or (device.type == "cpu" and _instructions() == "avx512_bf16")


@cache
def _instructions() -> str:
    return str(build_info()["cpu_isa"])


def report() -> dict[str, str]:
    """What `talkingdit info` says of the processor."""
    if multiplies_bfloat16(torch.device("cpu")):
        return {"bfloat16 on the CPU": "multiplied; training computes in it"}
    return {"bfloat16 on the CPU": "no instructions, several times slower than float32; training computes in float32"}


def bfloat16_products() -> torch.autocast:
    """A context in which processors multiply in bfloat16, if they do so themselves; else nothing changes."""
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16(torch.device("cpu")))


def fast_products(device: torch.device) -> AbstractContextManager[Any]:
    """A context for a model in bfloat16 without gradients: products take float32 where that is faster, a copy of each
    layer's weights at a time, and results are rounded to bfloat16. Sums are as wide as those of PyTorch's kernels.

    Args:
        device: where the model computes.
    """
    return nullcontext() if device.type != "cpu" or multiplies_bfloat16(device) else _Widened()


_PRODUCTS = {
    *(F.linear, F.conv1d, F.conv2d, F.scaled_dot_product_attention),
    *(torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm),
}


class _Widened(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and "out" not in kwargs:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            # Quantised weights and the like have products of their own.
            if any(map(_is_narrow, tensors)) and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
                wide = func(*map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()})
                return wide.to(torch.bfloat16)
        return func(*args, **kwargs)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"


def _widen(value: Any) -> Any:
    return value.float() if _is_narrow(value) else value
