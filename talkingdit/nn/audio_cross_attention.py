# SPDX-License-Identifier: Apache-2.0
"""Cross attention of video tokens to the few audio tokens of their own latent frame, with projections folded away.

With A audio tokens per frame, fewer than the D channels of a head, a projection is cheaper after the frame's keys and
values have been multiplied with it (as latent attention absorbs its up-projections):

    softmax(q_h k_h^T) v_h Wo_h = softmax(q_h k_h^T) V'_h       V'_h = v_h Wo_h      [A, dim] per frame and head
    (x Wq_h + bq_h) k_h^T       = x K'_h^T + bq_h k_h^T         K'_h = k_h Wq_h^T    [A, dim]

The output projection of H*D inputs becomes one of H*A, the query projection likewise. K' and V' do not depend on the
timestep: they are made once per clip. The algebra is exact, the rounding is another. A norm of the query divides by a
number that needs the whole query, so the second line holds only without one.

Each product with K' or V' is `ops.frame_linear`: on a GPU one kernel, which for V' also gates, masks and adds into the
residual stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from talkingdit import ops
from talkingdit.nn.layers import RMSNorm, wide
from talkingdit.ops._frames import even_frames

ABSORB = ("none", "value", "full")

# Absorbed keys and values have rows for so many heads and tokens: H*A, rounded up to whole pieces of 16 bytes of 16-bit
# types, which is how GPUs read them. What is added is zero.
_PIECE = 8
_FAST_HEADS = (32, 64, 128)  # channels of a head that `ops.audio_attention` is fast for


class CrossAttention(nn.Module):
    """Projections of a cross attention, with q and k RMS-normalised over all heads unless `qk_norm` is False.

    Args:
        dim: width of the tokens on both sides.
        num_heads: H.
        eps: of the norms.
        qk_norm: normalise q and k.
        head_dim: channels of a head, `dim / num_heads` if not given.
        bias: of the four projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        eps: float = 1e-6,
        qk_norm: bool = True,
        head_dim: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        inner = num_heads * self.head_dim
        self.q = nn.Linear(dim, inner, bias)
        self.k = nn.Linear(dim, inner, bias)
        self.v = nn.Linear(dim, inner, bias)
        self.o = nn.Linear(inner, dim, bias)
        self.norm_q = RMSNorm(inner, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(inner, eps) if qk_norm else nn.Identity()

    def query(self, x: Tensor | ops.EightBitRows) -> Tensor:
        """[..., dim], for a layer in eight bits also rows of it -> [..., heads, head_dim]."""
        return self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))

    def key_value(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[..., dim] -> k and v [..., heads, head_dim]; independent of the timestep."""
        k = self.norm_k(self.k(context)).unflatten(-1, (self.num_heads, -1))
        return k, self.v(context).unflatten(-1, (self.num_heads, -1))


class AudioMemory(NamedTuple):
    """What `AudioCrossAttention` keeps of the audio of a clip: F frames, A tokens each, H heads of D channels."""

    k: Tensor  # [B, F, A, H, D], or absorbed [B, F, dim, K], K = H*A rounded up to a multiple of 8, the rest zeros
    v: Tensor  # [B, F, A, H, D], or absorbed [B, F, K, dim]
    score_bias: Tensor | None = None  # [B, F, H*A], with absorbed keys
    out_bias: Tensor | None = None  # [dim], with absorbed values


class TokenSpan(NamedTuple):
    """Consecutive tokens whose frames are equally large, in a sequence of clips of several sizes."""

    tokens: int
    frames: int  # that these tokens are in
    tokens_per_frame: int
    token_offset: int = 0  # place of the first token in the first of the frames, where a shard has cut it


FrameSizes = int | tuple[TokenSpan, ...]


class PlacedSpan(NamedTuple):
    """A `TokenSpan` with its place."""

    tokens: slice
    frames: slice
    tokens_per_frame: int
    token_offset: int

    @property
    def place(self) -> tuple[int, int]:
        """Tokens per frame and offset, as the ops want them."""
        return self.tokens_per_frame, self.token_offset


def place_spans(sizes: FrameSizes, tokens: int, frames: int, token_offset: int = 0) -> list[PlacedSpan]:
    """The spans of `tokens` tokens in `frames` frames.

    Args:
        sizes: spans, or tokens per frame for a single one.
        token_offset: of the single one.
    """
    listed = (TokenSpan(tokens, frames, sizes, token_offset),) if not isinstance(sizes, tuple) else sizes
    spans = []
    token = frame = 0
    for span in listed:
        placed = slice(token, token + span.tokens), slice(frame, frame + span.frames)
        spans.append(PlacedSpan(*placed, span.tokens_per_frame, span.token_offset))
        token, frame = placed[0].stop, placed[1].stop
    return spans


def cut(x: Tensor, part: slice) -> Tensor:
    """`x[:, part]`, and x itself where that is all of it: a slice costs a copy of its gradient."""
    return x if part.start == 0 and part.stop == x.shape[1] else x[:, part]


class _Epilogue(NamedTuple):
    """What is done with the product of a frame's weights: `residual + mask * gate * (product + bias)`, into `out`."""

    bias: Tensor | None = None  # [dim]
    gate: Tensor | None = None  # [dim]
    mask: Tensor | None = None  # [B, N]
    residual: Tensor | None = None  # [B, N, dim]
    out: Tensor | None = None  # [B, N, dim], may be the residual itself

    def cut(self, tokens: slice) -> _Epilogue:
        """For some of the tokens."""
        mask, residual, out = (None if t is None else t[:, tokens] for t in (self.mask, self.residual, self.out))
        return _Epilogue(self.bias, self.gate, mask, residual, residual if self.out is self.residual else out)

    def add(self, value: Tensor) -> Tensor:
        """The same for a value that has the bias in it."""
        dtype = value.dtype if self.residual is None else self.residual.dtype
        if self.gate is not None:
            value = self.gate * value
        if self.mask is not None:
            value = self.mask[..., None] * value
        if self.residual is None:
            return value.to(dtype) if self.out is None else self.out.copy_(value)
        if self.out is self.residual:
            return self.residual.add_(value)
        return (self.residual + value).to(dtype) if self.out is None else self.out.copy_(self.residual + value)


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
        heads, size = self.num_heads, self.head_dim
        if absorb == "none":
            return AudioMemory(k, v)
        weight, out_bias = effective(self.o, heads * size, like=v)
        v = torch.einsum("bfahd,chd->bfhac", v, weight.unflatten(1, (heads, size))).flatten(2, 3)
        v = _rounded_up(v, 2)
        if absorb == "value":
            return AudioMemory(k, v, None, out_bias)
        weight, bias = effective(self.q, tokens.shape[-1], like=k)
        score_bias = torch.einsum("bfahd,hd->bfha", k, bias.unflatten(0, (heads, size))).flatten(2)
        k = torch.einsum("bfahd,hdc->bfcha", k, weight.unflatten(0, (heads, size))).flatten(3)
        k = _rounded_up(k, 3)
        return AudioMemory(k, v, score_bias, out_bias)

    def forward(
        self,
        x: Tensor,
        tokens_per_frame: FrameSizes,
        tokens: Tensor | None = None,
        memory: AudioMemory | None = None,
        absorb: str = "none",
        *,
        gate: Tensor | None = None,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        token_offset: int = 0,
    ) -> Tensor:
        """x [B, N, dim] with audio tokens [B, F, A, dim], or with their `memory`, -> [B, N, dim].

        Args:
            x: normalised tokens; N = F * S, or any contiguous shard of them, also an empty one.
            tokens_per_frame: S, or one `TokenSpan` for every part of a sequence of clips of several sizes.
            tokens: audio tokens, in the place of `memory`.
            memory: what `memory(tokens)` returned.
            absorb: as in `memory`; of `tokens` only.
            gate: [dim], multiplied with the result.
            mask: [B, N], multiplied with it: the share of a token that the audio drives, such as a face mask.
            residual: [B, N, dim], added to it; its dtype is the result's.
            out: where the result goes, may be `residual`; only where no gradient is needed.
            token_offset: place of the first token in the F frames; spans have their own.

        Raises:
            ValueError: neither tokens nor memory is given, or `absorb` does not fit (see `memory`).
        """
        if memory is None:
            if tokens is None:
                raise ValueError("AudioCrossAttention: tokens or memory must be given, got neither")
            memory = self.memory(tokens, absorb)
        k, v, score_bias, out_bias = memory
        epilogue = _Epilogue(out_bias, gate, mask, residual, out)
        spans = place_spans(tokens_per_frame, x.shape[1], k.shape[1], token_offset)
        x = self.query(x) if score_bias is None else x.to(k.dtype)
        if out_bias is None:
            attended = [
                ops.audio_attention(cut(x, span.tokens), cut(k, span.frames), cut(v, span.frames), *span.place)
                for span in spans
            ]
            return epilogue.add(self.o(_join(attended).flatten(2)))
        weights = [self._weights(x, memory, span) for span in spans]
        if residual is not None and residual.dtype not in (v.dtype, wide(v.dtype)):
            products = [
                _frame_linear(w, v[:, span.frames], span.place, _Epilogue(out_bias))
                for w, span in zip(weights, spans, strict=True)
            ]
            return epilogue.add(_join(products))
        if len(spans) == 1:
            return _frame_linear(weights[0], v, spans[0].place, epilogue)
        parts = [
            _frame_linear(w, v[:, span.frames], span.place, epilogue.cut(span.tokens))
            for w, span in zip(weights, spans, strict=True)
        ]
        return _join(parts) if out is None else out

    def _weights(self, x: Tensor, memory: AudioMemory, span: PlacedSpan) -> Tensor:
        """Attention weights [B, n, K] of the tokens of a span: x [B, N, H, D] queries, or [B, N, dim] tokens.

        K is H*A rounded up as in the memory, with zeros behind the weights.
        """
        x, k = cut(x, span.tokens), cut(memory.k, span.frames)
        if memory.score_bias is None:
            weights = self._unabsorbed_weights(x, k, span)
        else:
            scores = _frame_linear(x, k, span.place, _Epilogue())
            weights = self._softmax(scores, cut(memory.score_bias, span.frames), span)
        return _rounded_up(weights.flatten(2).to(memory.v.dtype), 2)

    def _unabsorbed_weights(self, q: Tensor, k: Tensor, span: PlacedSpan) -> Tensor:
        """[B, n, H, A] of queries [B, n, H, D] and keys [B, F, A, H, D]."""
        count = k.shape[2]
        if self.head_dim in _FAST_HEADS and count <= self.head_dim:
            # Attention to unit vectors: what comes out of a head are the weights of its tokens. One kernel, which reads
            # every query once, where there would be a small product per frame and head and a softmax of several passes.
            units = torch.eye(count, self.head_dim, dtype=k.dtype, device=k.device)[None, None, :, None]
            return ops.audio_attention(q, k, units.expand(k.shape), *span.place)[..., :count]
        parts = []
        for tokens, frames in even_frames(q.shape[1], *span.place):
            part = cut(q, tokens).unflatten(1, (frames.stop - frames.start, -1 if q.numel() else 0))
            scores = (part.permute(0, 1, 3, 2, 4) @ cut(k, frames).permute(0, 1, 3, 4, 2)).transpose(2, 3)
            scores = scores.to(wide(scores.dtype)) * self.head_dim**-0.5
            parts.append(scores.softmax(-1).flatten(1, 2))
        return _join(parts)

    def _softmax(self, scores: Tensor, bias: Tensor, span: PlacedSpan) -> Tensor:
        """[B, n, H, A] of scores [B, n, K] without their bias [B, F, H*A] and scale."""
        scale, scores = self.head_dim**-0.5, scores[..., : bias.shape[2]]
        bias = bias.to(wide(scores.dtype)) * scale
        parts = []
        for tokens, frames in even_frames(scores.shape[1], *span.place):
            part = cut(scores, tokens).unflatten(1, (frames.stop - frames.start, -1 if scores.numel() else 0))
            # In the wide type from the first operation on, which costs no pass of its own.
            part = torch.add(cut(bias, frames)[:, :, None], part, alpha=scale)
            parts.append(part.unflatten(-1, (self.num_heads, -1)).softmax(-1).flatten(1, 2))
        return _join(parts)


def _rounded_up(x: Tensor, axis: int) -> Tensor:
    """Contiguous, with zeros behind the axis, so that its length is a multiple of `_PIECE`."""
    missing = -x.shape[axis] % _PIECE
    return F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, missing)) if missing else x.contiguous()


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _frame_linear(x: Tensor, weight: Tensor, place: tuple[int, int], epilogue: _Epilogue) -> Tensor:
    """`ops.frame_linear`, written out where a gradient is needed."""
    bias, gate, mask, residual, out = epilogue
    given = (x, weight, bias, gate, mask, residual)
    tokens_per_frame, token_offset = place
    if out is None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return ops.frame_linear_reference(x, weight, tokens_per_frame, bias, gate, mask, residual, token_offset)
    return ops.frame_linear(x, weight, tokens_per_frame, bias, gate, mask, residual, token_offset, out=out)


def effective(linear: nn.Module, inputs: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, inputs] and bias [out] (zeros for none) that a linear layer applies, in the dtype of `like`.

    A layer with adapters, quantised weights or hooks around its forward is asked by calling it with the identity.
    """
    plain = type(linear) is nn.Linear and not hasattr(linear, "_diffusers_hook") and not linear._forward_hooks
    if plain and linear.weight.dtype == like.dtype and not is_traceable_wrapper_subclass(linear.weight):
        weight: Tensor = linear.weight  # type: ignore[assignment]
        return weight, weight.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias  # type: ignore[return-value]
    zero = like.new_zeros(1, inputs)
    bias = linear(zero)
    return (linear(torch.eye(inputs, dtype=like.dtype, device=like.device)) - bias).T, bias[0]
