# SPDX-License-Identifier: Apache-2.0
"""Small layers whose arithmetic is pinned: float32 inside whatever the parameters, the input or autocast say."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkingdit.ops.gelu_tanh import gelu_tanh
from talkingdit.ops.qk_norm_rope3d import rms_norm


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for inputs of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Float32Linear(nn.Linear):
    """A linear layer in float32 (float64 for float64 weights), also under autocast and with bfloat16 weights."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(dtype), self.weight.to(dtype), bias)


def lend(layer: nn.Module) -> tuple[Any, Any]:
    """Weight and bias of a layer, for an op that does the layer's arithmetic in its place.

    Hooks may bring weights in for the layer's own forward and take them away behind it (group offloading). Such a
    layer is called without input, and lends copies.
    """
    if hasattr(layer, "_diffusers_hook"):
        return layer(None)
    return layer.weight, getattr(layer, "bias", None)


class GeluTanh(nn.GELU):
    """`nn.GELU(approximate="tanh")` by `talkingdit.ops.gelu_tanh`."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Tensor) -> Tensor:
        """Any shape -> that shape."""
        return gelu_tanh(input)


class Lends(nn.Module):
    """Mixin of layers that `lend` works with. It comes first among the bases."""

    def forward(self, input: Tensor | None) -> Any:
        """The layer's result; called with None, copies of weight and bias."""
        if input is not None:
            return super().forward(input)
        bias: Any = getattr(self, "bias", None)
        weight: Any = self.weight
        return weight.clone(), None if bias is None else bias.clone()


class Conv1d(Lends, nn.Conv1d):
    """A convolution that lends its weights."""


class Conv3d(Lends, nn.Conv3d):
    """A convolution that lends its weights."""


_ROWS = 1024  # that are widened to float32 at once where no kernel does it inside


class _RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        compiling = torch.compiler.is_compiling()
        if x.device.type == "cpu" and x.shape[-1] % 2 == 0 and not compiling:  # of many small kernels one
            return rms_norm(x, self.weight, self.eps)
        if dtype == x.dtype or (x.is_cuda and x.dtype == self.weight.dtype):  # one kernel, float32 inside
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        weight = self.weight.to(dtype)
        if torch.is_grad_enabled() or compiling:
            return F.rms_norm(x.to(dtype), x.shape[-1:], weight, self.eps).to(x.dtype)
        rows = x.flatten(0, -2)
        out = torch.empty_like(rows)
        for part, into in zip(rows.split(_ROWS), out.split(_ROWS), strict=True):
            into.copy_(F.rms_norm(part.to(dtype), x.shape[-1:], weight, self.eps))
        return out.view(x.shape)


class RMSNorm(Lends, _RMSNorm):
    """Root-mean-square norm over the last axis with a weight: float32 statistics, result in the input's dtype."""


class _LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        dtype = wide(input.dtype)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class LayerNorm(Lends, _LayerNorm):
    """Layer norm with float32 statistics, also for a bfloat16 input; the result has the input's dtype."""


class PatchConv3d(nn.Conv3d):
    """A Conv3d whose stride is its kernel, computed as one matrix product per patch.

    Input [B, C, T, H, W]; output [B, t*h*w, out_channels] with tokens t-major, then h, then w, or the tokens begin ..
    end of them. What does not fill a whole patch at the end of an axis is cut off, as a convolution without padding
    does.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]):
        super().__init__(in_channels, out_channels, kernel_size=kernel, stride=kernel)

    def forward(self, input: Tensor, tokens: tuple[int, int] | None = None) -> Tensor:
        kt, kh, kw = self.kernel_size
        b, c, t, h, w = input.shape
        t, h, w = t // kt, h // kh, w // kw
        x = input[:, :, : t * kt, : h * kh, : w * kw].reshape(b, c, t, kt, h, kh, w, kw)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t * h * w, c * kt * kh * kw)
        if tokens is not None:
            x = x[:, tokens[0] : tokens[1]]
        return F.linear(x.to(self.weight.dtype), self.weight.flatten(1), self.bias)


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids of a timestep: [...] -> [..., dim], cosines first, angles in float64, result float32.

    Frequency j of dim/2 is 10000 ** (-j / (dim/2)).
    """
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.to(torch.float64)[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(torch.float32)
