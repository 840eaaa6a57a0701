# SPDX-License-Identifier: Apache-2.0
"""Attention to a piece of the keys, with what it takes to merge pieces and to go backward through one of many.

`scaled_dot_product_attention` does not give the softmax denominator, so PyTorch's kernels are called by their own
names; their signatures are the same in torch 2.10 to 2.13. Everything here is [B, H, tokens, D].
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from talkingdit.nn import attention_backends

aten = torch.ops.aten

# The logarithm of nothing: finite, so that differences of two of them are not NaN.
EMPTY = torch.finfo(torch.float32).min / 2

Extra = tuple[Tensor | None, ...]


class AttentionPiece(NamedTuple):
    """Attention to some or to all of the keys."""

    out: Tensor  # [B, H, N, D], normalised over these keys
    lse: Tensor  # [B, H, N] float32 (float64 for float64): natural logarithm of the softmax denominator
    extra: Extra  # what the backward of the same kernel wants


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str) -> AttentionPiece:
    """Attention to some of the keys.

    Args:
        q: [B, H, N, D], not empty.
        k, v: [B, H, M, D], not empty.
        mask: bool [B, M] of keys.
        backend: as `talkingdit.nn.attention_backends.choose` gave it; "auto" is "torch". On CUDA, for 16 bits and no
            mask, "torch" is flash and "cudnn_first" cuDNN. Libraries go forward only.

    Returns:
        Zeros and a logarithm of EMPTY where a sample has none of these keys.

    Raises:
        ValueError: for a backend that the device does not have, or flash with a mask on CUDA.
    """
    out, lse, extra = _kernel(q, mask, backend).forward(q, k, v, mask)
    if mask is not None:  # kernels disagree about what attention to nothing is
        nothing = ~mask.any(1)[:, None, None]
        out, lse = out.masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, EMPTY)
    return AttentionPiece(out, lse, extra)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    whole: AttentionPiece,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """This piece's part of the gradients of q, and the gradients of its k and v.

    Args:
        grad: [B, H, N, D], gradient of attention to all keys.
        whole: attention to all keys; `extra` as it came from `forward` of any of the pieces.
    """
    grads = _kernel(q, mask, backend).backward(grad, q, k, v, mask, whole._replace(lse=whole.lse.contiguous()))
    if mask is None:
        return grads
    nothing = ~mask.any(1)[:, None, None, None]
    dq, dk, dv = (x.masked_fill(nothing, 0) for x in grads)
    return dq, dk, dv


class _Kernel(Protocol):
    """Attention and its backward; all have one form, kernels differ in what they return and in which shape."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionPiece: ...

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, whole: AttentionPiece
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class _Cpu(_Kernel):
    """In float32 at least: its backward in half precision is slower."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionPiece:
        q, k, v = _wide(q, k, v)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=_bias(mask, q))
        return AttentionPiece(out, lse, ())

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, whole: AttentionPiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = _wide(grad, q, k, v, whole.out)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, whole.lse, 0.0, False, attn_mask=_bias(mask, q)
        )


class _Flash(_Kernel):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionPiece:
        out, lse, ends_q, ends_k, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v)
        return AttentionPiece(out, lse, (ends_q, ends_k, seed, offset))

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, whole: AttentionPiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, (ends_q, ends_k, seed, offset) = whole
        lengths = q.shape[2], k.shape[2]
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, ends_q, ends_k, *lengths, 0.0, False, seed, offset
        )


class _Cudnn(_Kernel):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionPiece:
        out, lse, ends_q, ends_k, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, _bias(mask, q), True
        )
        return AttentionPiece(out, lse.squeeze(-1), (ends_q, ends_k, seed, offset))

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, whole: AttentionPiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, (ends_q, ends_k, seed, offset) = whole
        lengths = q.shape[2], k.shape[2]
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse[..., None], seed, offset, _bias(mask, q), ends_q, ends_k, *lengths, 0.0, False
        )


class _Efficient(_Kernel):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionPiece:
        k, v, mask = _Efficient._filled_up(k, v, mask)
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(q, k, v, _bias(mask, q), True)
        return AttentionPiece(out, lse[..., : q.shape[2]], (seed, offset))

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, whole: AttentionPiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The kernel wants rows of lse in multiples of 32; what stands behind the last query gets no weight.
        lse = F.pad(whole.lse, (0, -whole.lse.shape[-1] % 32), value=torch.inf)
        wanted, keys = [True, True, True, False], k.shape[2]
        k, v, mask = _Efficient._filled_up(k, v, mask)
        of_q, of_k, of_v = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, _bias(mask, q), whole.out, lse, *whole.extra, 0.0, wanted
        )[:3]
        return of_q, of_k[:, :, :keys], of_v[:, :, :keys]

    @staticmethod
    def _filled_up(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Masked keys behind the others, to sixteen: with a mask the backward in 16 bits is wrong for a single key."""
        missing = 16 - k.shape[2]
        if mask is None or missing <= 0:
            return k, v, mask
        return F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing)), F.pad(mask, (0, missing), value=False)


class _Math(_Kernel):
    """Plain matrix products, for devices and head sizes without a kernel: holds the whole matrix of weights."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionPiece:
        q, k, v = _wide(q, k, v)
        scores = _Math._scores(q, k, mask)
        lse = scores.logsumexp(-1)
        return AttentionPiece((scores - lse[..., None]).exp() @ v, lse, ())

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, whole: AttentionPiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = _wide(grad, q, k, v, whole.out)
        weights = (_Math._scores(q, k, mask) - whole.lse[..., None]).exp()
        of_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        return of_scores @ k, of_scores.mT @ q, weights.mT @ grad

    @staticmethod
    def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores if mask is None else scores.masked_fill(~mask[:, None, None], -torch.inf)


class _Library(_Kernel):
    """A kernel of another package, without a backward from the denominator of the whole."""

    name: str

    @classmethod
    def forward(cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionPiece:
        assert mask is None  # `choose` gives calls with a mask to others
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = attention_backends.attend(cls.name, q, k, v, lse=True)
        assert lse is not None
        return AttentionPiece(out.transpose(1, 2), lse, ())


_LIBRARIES: dict[str, type[_Kernel]] = {
    name: type(f"_{name}", (_Library,), {"name": name}) for name in attention_backends.LIBRARIES
}
_CUDA: dict[str, type[_Kernel]] = {"flash": _Flash, "efficient": _Efficient, "cudnn": _Cudnn, "math": _Math}
_CPU: dict[str, type[_Kernel]] = {"flash": _Cpu, "math": _Math, "auto": _Cpu}
_OTHER: dict[str, type[_Kernel]] = {"math": _Math, "auto": _Math}


def _kernel(q: Tensor, mask: Tensor | None, backend: str) -> type[_Kernel]:
    if backend in _LIBRARIES:
        return _LIBRARIES[backend]
    if backend == "torch":
        backend = "auto"
    if not q.is_cuda:
        kernels = _CPU if q.is_cpu else _OTHER
        if backend not in kernels:
            raise ValueError(
                f"attention: in ring mode backend must be one of {', '.join(kernels)} on {q.device.type}, "
                f"got {backend!r}"
            )
        return kernels[backend]
    if backend == "flash" and mask is not None:
        raise ValueError("attention: backend flash takes no mask in ring mode, use auto or efficient")
    if backend in ("auto", "cudnn_first"):
        half, aligned, dim = q.dtype in (torch.float16, torch.bfloat16), q.shape[-1] % 8 == 0, q.shape[-1]
        if half and aligned and mask is None and dim <= 256:
            return _Cudnn if backend == "cudnn_first" and dim <= 128 else _Flash
        return _Efficient if aligned and q.dtype != torch.float64 else _Math
    return _CUDA[backend]


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """0 or minus infinity for every pair of query and key. The rows begin at aligned addresses, which CUDA asks for."""
    if mask is None:
        return None
    batch, keys = mask.shape
    rows = torch.zeros(batch, keys + -keys % 16, dtype=q.dtype, device=q.device)[:, :keys]
    rows.masked_fill_(~mask, -torch.inf)
    return rows[:, None, None].expand(batch, q.shape[1], q.shape[2], keys)
