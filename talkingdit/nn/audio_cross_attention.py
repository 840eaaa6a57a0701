# SPDX-License-Identifier: Apache-2.0
"""Cross attention of video tokens to the few audio tokens of their own latent frame, with projections folded away.

With A audio tokens per frame, fewer than the D channels of a head, a projection is cheaper after the frame's keys and
values have been multiplied with it (as latent attention absorbs its up-projections):

    softmax(q_h k_h^T) v_h Wo_h = softmax(q_h k_h^T) V'_h       V'_h = v_h Wo_h      [A, dim] per frame and head
    (x Wq_h + bq_h) k_h^T       = x K'_h^T + bq_h k_h^T         K'_h = k_h Wq_h^T    [A, dim]

The output projection of H*D inputs becomes one of H*A, the query projection likewise. K' and V' do not depend on the
timestep: they are made once per clip. The algebra is exact, the rounding is another. A norm of the query divides by a
number that needs the whole query, so the second line holds only without one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from talkingdit import ops
from talkingdit.nn.layers import RMSNorm, wide

ABSORB = ("none", "value", "full")


class CrossAttention(nn.Module):
    """Projections of a cross attention, with q and k RMS-normalised over all heads unless `qk_norm` is False."""

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6, qk_norm: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps) if qk_norm else nn.Identity()

    def query(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., heads, head_dim]."""
        return self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))

    def key_value(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[..., dim] -> k and v [..., heads, head_dim]; independent of the timestep."""
        k = self.norm_k(self.k(context)).unflatten(-1, (self.num_heads, -1))
        return k, self.v(context).unflatten(-1, (self.num_heads, -1))


class AudioMemory(NamedTuple):
    """What `AudioCrossAttention` keeps of the audio of a clip: F frames, A tokens each, H heads of D channels."""

    k: Tensor  # [B, F, A, H, D], or absorbed [B, F, H*A, dim]
    v: Tensor  # [B, F, A, H, D], or absorbed [B, F, H*A, dim]
    score_bias: Tensor | None = None  # [B, F, H*A], with absorbed keys
    out_bias: Tensor | None = None  # [dim], with absorbed values


class AudioCrossAttention(CrossAttention):
    """Attention of every video token to the audio tokens of its own latent frame."""

    def memory(self, tokens: Tensor, absorb: str = "none") -> AudioMemory:
        """Keys and values of audio tokens [B, F, A, dim].

        Args:
            tokens: independent of the timestep, like the result.
            absorb: "none"; "value" folds the output projection into the values; "full" also the query projection into
                the keys, for modules without q-norm.

        Raises:
            ValueError: `absorb` has another name, or is "full" although the query is normalised.
        """
        if absorb not in ABSORB:
            raise ValueError(f"AudioCrossAttention: absorb must be one of {', '.join(ABSORB)}, got {absorb!r}")
        if absorb == "full" and not isinstance(self.norm_q, nn.Identity):
            raise ValueError(
                "AudioCrossAttention: absorb must be 'none' or 'value' in a module with q-norm, whose divisor is "
                "made of the query itself, got 'full'"
            )
        k, v = self.key_value(tokens)
        if absorb == "none":
            return AudioMemory(k, v)
        weight, out_bias = effective(self.o, like=v)
        v = torch.einsum("bfahd,chd->bfhac", v, weight.unflatten(1, (self.num_heads, -1))).flatten(2, 3)
        if absorb == "value":
            return AudioMemory(k, v, None, out_bias)
        weight, bias = effective(self.q, like=k)
        score_bias = torch.einsum("bfahd,hd->bfha", k, bias.unflatten(0, (self.num_heads, -1))).flatten(2)
        k = torch.einsum("bfahd,hdc->bfhac", k, weight.unflatten(0, (self.num_heads, -1))).flatten(2, 3)
        return AudioMemory(k, v, score_bias, out_bias)

    def forward(
        self,
        x: Tensor,
        tokens_per_frame: int,
        tokens: Tensor | None = None,
        memory: AudioMemory | None = None,
        absorb: str = "none",
    ) -> Tensor:
        """x [B, F * S, dim] with audio tokens [B, F, A, dim], or with their `memory`, -> [B, F * S, dim].

        Raises:
            ValueError: neither tokens nor memory is given, or `absorb` does not fit (see `memory`).
        """
        if memory is None:
            if tokens is None:
                raise ValueError("AudioCrossAttention: tokens or memory must be given, got neither")
            memory = self.memory(tokens, absorb)
        if memory.out_bias is None:
            out = ops.audio_attention(self.query(x), memory.k, memory.v, tokens_per_frame=tokens_per_frame)
            return self.o(out.flatten(2))
        heads, scale = self.num_heads, (x.shape[-1] // self.num_heads) ** -0.5
        x = x.unflatten(1, (-1, tokens_per_frame))
        if memory.score_bias is None:
            q = self.query(x).permute(0, 1, 3, 2, 4)
            scores = (q @ memory.k.permute(0, 1, 3, 4, 2)).transpose(2, 3)
        else:
            scores = (x @ memory.k.transpose(2, 3) + memory.score_bias[:, :, None]).unflatten(-1, (heads, -1))
        weights = (scores.to(wide(scores.dtype)) * scale).softmax(-1).flatten(3)
        return (weights.to(memory.v.dtype) @ memory.v + memory.out_bias).flatten(1, 2)


def effective(linear: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] that a linear layer applies, in the dtype of `like`.

    A layer with adapters, quantised weights or hooks around its forward is asked by calling it with the identity.
    """
    plain = type(linear) is nn.Linear and not hasattr(linear, "_diffusers_hook")
    if plain and linear.weight.dtype == like.dtype and not is_traceable_wrapper_subclass(linear.weight):
        return linear.weight, linear.bias  # type: ignore[return-value]
    zero = like.new_zeros(1, like.shape[-2] * like.shape[-1])
    bias = linear(zero)
    return (linear(torch.eye(zero.shape[1], dtype=like.dtype, device=like.device)) - bias).T, bias[0]
