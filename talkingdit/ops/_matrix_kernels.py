# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes a matrix product on a GPU.

"general" (cuda/gemm.cuh) takes every GPU, dtype, size and alignment. "cutlass" (cuda/sm90a) takes bfloat16 on GPUs of
compute capability 9.0. "library" multiplies what a kernel gathered with cuBLAS; framepack alone has it. "auto" asks
``MEASURED``, and takes the general one for what is not there; framepack in 16 bits takes the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from talkingdit._native_loader import native

KERNELS = ("auto", "general", "cutlass", "library")


@dataclass(frozen=True)
class Measured:
    """A measurement that "cutlass", or "epilogue" of linear_gelu, won.

    Attributes:
        op: "frame_linear", "framepack" or "linear_gelu".
        inner: lengths of the sums (H * A of frame_linear, elements of the largest patch of framepack) that it holds
            for, from the first to before the second.
        columns: likewise, channels of the result.
        result_bytes: bytes of an element of the result, None for any.
    """

    op: str
    inner: tuple[int, int]
    columns: tuple[int, int]
    result_bytes: int | None = None

    def holds(self, op: str, inner: int, columns: int, result_bytes: int) -> bool:
        return (
            op == self.op
            and self.inner[0] <= inner < self.inner[1]
            and self.columns[0] <= columns < self.columns[1]
            and self.result_bytes in (None, result_bytes)
        )


# Filled from `python -m bench frame_linear framepack` on an H100 or H200, which time all kernels. On an H200 "cutlass"
# takes 0.53x to 0.76x of the general kernel's time in frame_linear, for sums of 60 to 960 and 1,536 to 5,120 channels,
# into both widths of the stream (bench/results/cuda-frame_linear*.json). In framepack cuBLAS is a little ahead of it.
# `python -m bench.gpu --only block` times "epilogue" of linear_gelu in whole blocks; it has not been measured yet.
MEASURED: tuple[Measured, ...] = (Measured("frame_linear", inner=(60, 961), columns=(1536, 5121)),)


@dataclass(frozen=True)
class ProductRequest:
    """A product that somebody asks for.

    Attributes:
        kernel: of ``KERNELS``.
        obstacle: what "cutlass" needs and does not find, or None.
        copies: "cutlass" would have to copy a large operand first.
    """

    op: str
    kernel: str
    inner: int
    columns: int
    result_bytes: int
    obstacle: str | None
    copies: bool = False

    def cutlass(self) -> bool:
        """Does "cutlass" compute it?

        Raises:
            ValueError: it was asked for and cannot.
        """
        if self.kernel == "cutlass" and self.obstacle is not None:
            raise ValueError(f"{self.op}: kernel 'cutlass' needs {self.obstacle}")
        if self.kernel != "auto":
            return self.kernel == "cutlass"
        if self.obstacle is not None or self.copies:
            return False
        return any(m.holds(self.op, self.inner, self.columns, self.result_bytes) for m in MEASURED)


def check_kernel(op: str, kernel: str, device: torch.device) -> None:
    """Checks the argument ``kernel`` of an op.

    Raises:
        ValueError: there is no such kernel, or none to choose from on the CPU.
    """
    kernels = KERNELS if op == "framepack" else KERNELS[:-1]
    if kernel not in kernels:
        raise ValueError(f"{op}: kernel must be one of {', '.join(kernels)}, got {kernel!r}")
    if kernel != "auto" and device.type == "cpu":
        raise ValueError(f"{op}: kernel must be 'auto' for tensors on the CPU, got {kernel!r}")


@lru_cache(maxsize=64)
def ready(device: torch.device) -> bool:
    """Is this a GPU that "cutlass" was built for?"""
    if device.type != "cuda" or not native.build_info().get("cutlass", False):
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def obstacle(tensors: Sequence[Tensor], inner: int, aligned_rows: Sequence[Tensor] = ()) -> str | None:
    """What "cutlass" needs of these tensors and does not find, or None.

    Args:
        tensors: operands.
        inner: length of the sums.
        aligned_rows: tensors that it reads or writes where they are.
    """
    if not ready(tensors[0].device):
        return "a GPU of compute capability 9.0 and a build with its kernels"
    if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        return f"bfloat16, got {', '.join(str(tensor.dtype) for tensor in tensors)}"
    if inner == 0:
        return "something to sum, got sums of no elements"
    if not all(movable(tensor) for tensor in aligned_rows):
        return "results and residuals whose rows are aligned to 16 bytes"
    return None


def movable(value: Tensor) -> bool:
    """Can TMA move its rows where they are: aligned to 16 bytes, none repeated?"""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        return False
    strides = [value.stride(i) for i in range(value.dim() - 1) if value.shape[i] > 1]
    aligned = all(stride > 0 and stride * value.element_size() % 16 == 0 for stride in strides)
    return aligned and value.data_ptr() % 16 == 0


def moved(value: Tensor) -> Tensor:
    """The tensor itself if it is movable, else a copy that is: rows padded to whole pieces of 16 bytes."""
    if movable(value):
        return value
    piece = 16 // value.element_size()
    room = value.new_empty(*value.shape[:-1], -(-value.shape[-1] // piece) * piece)
    return room[..., : value.shape[-1]].copy_(value)
