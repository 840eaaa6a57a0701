# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for attention libraries that need a GPU: the same names, parameters and results, in float32 on the host.

FlashAttention 3 as of hopper/flash_attn_interface.py of Dao-AILab/flash-attention, SageAttention as of
sageattention/core.py of thu-ml/SageAttention 2.2.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _softmax(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B, N, H, D] -> the same, and the logarithm of the denominator [B, H, N]."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * scale
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.float()), scores.logsumexp(-1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Takes float8 with factors [B, H] too, whose result is bfloat16."""
    assert not causal
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    dtype = q.dtype
    if dtype == torch.float8_e4m3fn:
        dtype = torch.bfloat16
        for scale in (q_descale, k_descale, v_descale):
            assert scale is not None
            assert (scale.dtype, scale.shape) == (torch.float32, (q.shape[0], q.shape[2]))
        q, k, v = (x.float() * s[:, None, :, None] for x, s in ((q, q_descale), (k, k_descale), (v, v_descale)))
    else:
        assert dtype in (torch.bfloat16, torch.float16)
    out, lse = _softmax(q, k, v, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    return (out.to(dtype), lse) if return_attn_probs else out.to(dtype)


def old_flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, **others: Any
) -> tuple[Tensor, Tensor]:
    """The first releases, which return both without being asked."""
    assert "return_attn_probs" not in others
    return flash_attn_func(q, k, v, softmax_scale, causal, return_attn_probs=True, **others)


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> Any:
    """Keys without their mean and eight bits for q and k, as the real one has them, a row at a time."""
    assert tensor_layout == "NHD"
    assert not kwargs
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[-1] <= 128
    mean = k.float().mean(1, keepdim=True)
    eight = [_int8(q.float()), _int8(k.float() - mean)]
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    out, lse = _softmax(*eight, v, scale)
    lse = lse + scale * torch.einsum("bnhd,bmhd->bhn", q.float(), mean)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def _int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def modules() -> dict[str, ModuleType]:
    """By the names under which they are imported."""
    flash, sage = ModuleType("flash_attn_interface"), ModuleType("sageattention")
    flash.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    sage.sageattn = sageattn  # type: ignore[attr-defined]
    return {module.__name__: module for module in (flash, sage)}
