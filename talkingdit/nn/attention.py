# SPDX-License-Identifier: Apache-2.0
"""The one place through which attention over a whole sequence goes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Softmax attention, scale D ** -0.5.

    Args:
        q: [B, N, H, D].
        k, v: [B, M, H, D].
        mask: bool [B, M], true where a key may be attended; None attends all.
        backend: "auto" lets PyTorch choose; "flash", "efficient", "cudnn" and "math" name one of its kernels.

    Returns:
        [B, N, H, D] in q's dtype.

    Raises:
        ValueError: for a backend of another name or a mask of another shape.
    """
    if backend != "auto" and backend not in _BACKENDS:
        raise ValueError(f"attention: backend must be auto or one of {', '.join(_BACKENDS)}, got {backend!r}")
    if mask is not None:
        if mask.shape != (k.shape[0], k.shape[1]):
            raise ValueError(
                f"attention: mask must have the shape of the keys {(k.shape[0], k.shape[1])}, got {tuple(mask.shape)}"
            )
        mask = mask[:, None, None, :]
    dtype = q.dtype
    if q.is_cpu and dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled():
        # The CPU's backward in half precision is slower than in float32, seven times with few keys.
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False), _choice(backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).to(dtype)


def _choice(backend: str) -> AbstractContextManager[None]:
    return nullcontext() if backend == "auto" else sdpa_kernel(_BACKENDS[backend])
