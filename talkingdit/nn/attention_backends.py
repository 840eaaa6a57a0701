# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes attention: PyTorch's own, or libraries that are used where they are installed.

"auto" takes exact kernels alone. On Hopper that is FlashAttention 3 (Shah et al., arXiv 2407.08608) if it is installed,
else cuDNN, which is ahead of PyTorch's FlashAttention 2 there; everywhere else it is PyTorch's choice. Kernels that
round to eight bits inside, "flash3_fp8" and "sage" (Zhang et al., SageAttention 2, arXiv 2411.10958), are taken only
where they are named, and have no backward.

A library is imported when it is first used. What one of them does not take (a mask, float32, larger heads) goes to
"auto", so that a model may be told a backend as a whole.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TORCH = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_CUDNN_FIRST = [TORCH["cudnn"], TORCH["flash"], TORCH["efficient"], TORCH["math"]]


class Library(NamedTuple):
    """A kernel of another package."""

    modules: tuple[str, ...]  # where it may be, the newest place first
    package: str  # what people install
    head_dim: int  # at most
    hopper: bool  # needs compute capability 9.0
    backward: bool


LIBRARIES = {
    "flash3": Library(("flash_attn_interface", "flash_attn_3.flash_attn_interface"), "flash-attn-3", 256, True, True),
    "flash3_fp8": Library(
        ("flash_attn_interface", "flash_attn_3.flash_attn_interface"), "flash-attn-3", 256, True, False
    ),
    "sage": Library(("sageattention",), "sageattention", 128, False, False),
}
BACKENDS = (*TORCH, *LIBRARIES)
HOPPER = (9, 0)
_FOUND: dict[str, bool] = {}  # which libraries are installed, of those that were looked for


class Choice(NamedTuple):
    """What computes attention, and why."""

    backend: str  # "torch": PyTorch's own choice; "cudnn_first"; or one of BACKENDS
    reason: str


def choose(backend: str, q: Tensor, masked: bool, gradients: bool, ring: bool = False) -> str:
    """The kernel for a call: "torch", "cudnn_first", or one of BACKENDS.

    Args:
        backend: "auto" or one of BACKENDS.
        q: [B, N, H, D] or [B, H, N, D]; its device, dtype and D count.
        masked, gradients: is there a mask, is a gradient recorded?
        ring: the backward goes on from the denominator of the whole ring, which libraries do not offer.

    Raises:
        ValueError: a library that is not installed or does not run on this device, or that has no backward where a
            gradient is recorded.
    """
    capability = _capability_of(q)
    library = LIBRARIES.get(backend)
    if library is not None:
        if gradients and not library.backward:
            raise ValueError(f"attention: backend {backend} has no backward, got tensors that need a gradient")
        _check_usable(backend, library, q.device, capability)
        if not _takes(library, q, masked) or (gradients and ring):
            backend = "auto"
    if backend != "auto":
        return backend
    if capability is None:
        return "torch"
    return _on_gpu(capability, _takes(LIBRARIES["flash3"], q, masked) and not (gradients and ring)).backend


def torch_kernels(choice: str) -> AbstractContextManager[None]:
    """In which `scaled_dot_product_attention` does what `choose` said."""
    if choice == "torch":
        return nullcontext()
    if choice == "cudnn_first":
        return sdpa_kernel(_CUDNN_FIRST, set_priority=True)
    return sdpa_kernel(TORCH[choice])


def attend(choice: str, q: Tensor, k: Tensor, v: Tensor, lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Attention by a library, scale D ** -0.5, without a mask.

    Args:
        choice: one of LIBRARIES.
        q, k, v: [B, N, H, D] and [B, M, H, D] of a 16-bit type.
        lse: also give the natural logarithm of the softmax denominator.

    Returns:
        [B, N, H, D] in the dtype of q; the logarithm [B, H, N] float32 or None.
    """
    if choice == "sage":
        result = _module("sage").sageattn(q, k, v, tensor_layout="NHD", is_causal=False, return_lse=lse)
        return result if lse else (result, None)
    scales = {}
    dtype = q.dtype
    if choice == "flash3_fp8":
        (q, q_scale), (k, k_scale), (v, v_scale) = (_float8_heads(x) for x in (q, k, v))
        scales = {"q_descale": q_scale, "k_descale": k_scale, "v_descale": v_scale}
    function = _module(choice).flash_attn_func
    # Releases of before May 2025 return both without being told, and do not know the word.
    told = {"return_attn_probs": True} if lse and "return_attn_probs" in _parameters(function) else {}
    result = function(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=False, **scales, **told)
    out, denominator = result[:2] if isinstance(result, tuple) else (result, None)
    return out.to(dtype), denominator if lse else None


def report() -> dict[str, str]:
    """What "auto" takes on this machine and why, and which libraries were found: lines by name."""
    if torch.cuda.is_available():
        choice = _on_gpu(_capability(torch.cuda.current_device()), True)
    else:
        choice = Choice("torch", "no GPU: PyTorch's flash kernel for CPUs, in bfloat16 as in float32")
    found = (f"{name} {'found' if installed(name) else 'not installed'}" for name in LIBRARIES)
    return {"attention": f"{choice.backend} ({choice.reason})", "attention_libraries": ", ".join(found)}


def check(backend: str, device: torch.device) -> None:
    """Can a model compute on a device with a backend?

    Raises:
        ValueError: a library that is not installed or does not run there.
    """
    if backend in LIBRARIES:
        capability = _capability(device.index or 0) if device.type == "cuda" else None
        _check_usable(backend, LIBRARIES[backend], device, capability)


def installed(name: str) -> bool:
    """Can the library behind a backend be imported? It is looked for once."""
    if name not in _FOUND:
        _FOUND[name] = _place(name) is not None
    return _FOUND[name]


def _place(name: str) -> str | None:
    """The module that has the library; nothing is imported but the package around it."""
    for module in LIBRARIES[name].modules:
        try:
            if module in sys.modules or importlib.util.find_spec(module) is not None:
                return module
        except ModuleNotFoundError:  # of the package around it
            continue
    return None


def _module(name: str):  # type: ignore[no-untyped-def]  # of libraries without types
    place = _place(name)
    assert place is not None  # `choose` has looked
    return importlib.import_module(place)


@functools.cache
def _parameters(function):  # type: ignore[no-untyped-def]
    return frozenset(inspect.signature(function).parameters)


def _check_usable(backend: str, library: Library, device: torch.device, capability: tuple[int, int] | None) -> None:
    if not installed(backend):
        raise ValueError(f"attention: backend {backend} needs the package {library.package}, which is not installed")
    if capability is None:
        raise ValueError(f"attention: backend {backend} runs on CUDA devices, got {device.type}")
    if library.hopper and capability != HOPPER:
        raise ValueError(
            f"attention: backend {backend} runs on GPUs of compute capability 9.0 (Hopper), got "
            f"{capability[0]}.{capability[1]}"
        )


def _takes(library: Library, q: Tensor, masked: bool) -> bool:
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and not masked and q.shape[-1] <= library.head_dim and q.shape[-1] % 8 == 0


def _on_gpu(capability: tuple[int, int], takes: bool) -> Choice:
    """Of "auto"; `takes`: FlashAttention 3 takes such a call."""
    if capability != HOPPER:
        return Choice("torch", "not Hopper: PyTorch's order of kernels")
    if not takes:
        return Choice("cudnn_first", "Hopper, for a call that FlashAttention 3 does not take")
    if installed("flash3"):
        return Choice("flash3", "Hopper with FlashAttention 3 installed")
    return Choice("cudnn_first", "Hopper without FlashAttention 3: cuDNN, then PyTorch's order of kernels")


def _capability_of(q: Tensor) -> tuple[int, int] | None:
    """Compute capability of the device that a tensor is on, None where it is not a GPU."""
    return _capability(q.device.index or 0) if q.is_cuda else None


def _capability(device: int) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(device)  # the one of these functions that graphs take for a constant
    return found.major, found.minor


def _float8_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes of [B, N, H, D], and what every head [B, H] of them is multiplied with, float32."""
    most = torch.finfo(torch.float8_e4m3fn).max
    scale = x.abs().amax((1, 3)).float().clamp(min=1e-12) / most
    return (x / scale[:, None, :, None]).clamp(-most, most).to(torch.float8_e4m3fn), scale


if torch.cuda.is_available():  # looked for now, not while a graph is being traced
    for _name in LIBRARIES:
        installed(_name)
