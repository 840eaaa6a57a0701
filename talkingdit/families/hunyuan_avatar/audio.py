# SPDX-License-Identifier: Apache-2.0
"""Voices in HunyuanVideo-Avatar (arXiv:2505.20156, section 3.3): features to tokens of a latent frame, and on to faces.

A voice is heard by the tokens of its own face: the attention of every speaker is weighted with a mask and a strength,
and added up. The adapter has one wide head, so that with A audio tokens per frame and speaker, far fewer than its
channels, both of its large projections fold into the audio, exactly:

    softmax(x Wq k^T) v Wo = softmax(x K') V'       K' = Wq k^T [dim, A],  V' = v Wo [A, dim]

Several speakers lie behind each other in K' and V', each with a softmax of its own: one product serves all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.nn.audio_cross_attention import TokenSpan, cut, effective, place_spans
from talkingdit.nn.layers import LayerNorm, wide

ABSORB = ("none", "full")
FRAMES_PER_LATENT = 4  # video frames of a latent frame; the first latent frame is one video frame
_PIECE = 8  # K' and V' have rows for so many tokens or a multiple: GPUs read 16 bytes at once


class AudioProjector(nn.Module):
    """Features of the speech encoder around a video frame to a few audio tokens.

    Args:
        channels, blocks, window: of the features: width, hidden states of the encoder, places in time per video frame.
        intermediate: inner width.
        dim: of the tokens.
        tokens: per video frame.
    """

    def __init__(self, channels: int, blocks: int, window: int, intermediate: int, dim: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.proj1 = nn.Linear(window * blocks * channels, intermediate)
        self.proj2 = nn.Linear(intermediate, intermediate)
        self.proj3 = nn.Linear(intermediate, tokens * dim)
        self.norm = LayerNorm(dim, eps=1e-5)

    def forward(self, features: Tensor) -> Tensor:
        """[..., window, blocks, channels] -> [..., tokens, dim]."""
        x = features.flatten(-3).to(self.proj1.weight.dtype)
        x = F.relu(self.proj2(F.relu(self.proj1(x))))
        return self.norm(self.proj3(x).unflatten(-1, (self.tokens, -1)))

    def latent_tokens(self, features: Tensor) -> Tensor:
        """[..., 4 T - 3, window, blocks, channels] -> [..., T, 4 tokens, dim], by latent frames.

        The first latent frame is one video frame, whose tokens stand there four times.
        """
        return fold_frames(self(features))


def fold_frames(tokens: Tensor) -> Tensor:
    """Tokens of video frames [..., 4 T - 3, n, dim] -> of latent frames [..., T, 4 n, dim]."""
    first = tokens[..., :1, :, :].expand(*tokens.shape[:-3], FRAMES_PER_LATENT - 1, -1, -1)
    return torch.cat([first, tokens], dim=-3).unflatten(-3, (-1, FRAMES_PER_LATENT)).flatten(-3, -2)


class VoiceMemory(NamedTuple):
    """What an adapter keeps of the voices of a clip: P speakers, F frames, A tokens each."""

    k: Tensor  # [B, P, F, A, 1, D], or absorbed [B, F, dim, K], K = P*A rounded up to a multiple of 8, the rest zeros
    v: Tensor  # [B, P, F, A, 1, D], or absorbed [B, F, K, dim]
    tokens: int  # A


class FaceAudioAdapter(nn.Module):
    """Attention of every video token to the voices in its latent frame, weighted by who of them moves it.

    Args:
        dim: of the tokens.
        inner: channels of the one head.
    """

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.inner = inner
        self.norm1 = LayerNorm(dim, eps=1e-5)  # of the audio
        self.norm2 = LayerNorm(dim, eps=1e-5)  # of the video
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def memory(self, audio: Tensor, absorb: str = "none") -> VoiceMemory:
        """Keys and values of the voices [B, P, F, A, dim], which do not depend on the timestep.

        Args:
            absorb: "none", or "full": both projections of the video tokens are folded in, for inference.
        """
        k, v = self.to_kv(self.norm1(audio)).chunk(2, dim=-1)
        tokens = audio.shape[3]
        if absorb == "none":
            return VoiceMemory(k.unsqueeze(-2), v.unsqueeze(-2), tokens)
        q_weight, _ = effective(self.to_q, audio.shape[-1], like=k)
        o_weight, _ = effective(self.to_out, self.inner, like=v)
        k = (k @ q_weight).permute(0, 2, 4, 1, 3).flatten(3)
        v = (v @ o_weight.T).permute(0, 2, 1, 3, 4).flatten(2, 3)
        missing = -k.shape[3] % _PIECE
        return VoiceMemory(F.pad(k, (0, missing)).contiguous(), F.pad(v, (0, 0, 0, missing)).contiguous(), tokens)

    def forward(
        self,
        x: Tensor,
        audio: Tensor | None,
        weights: Tensor,
        spans: tuple[TokenSpan, ...],
        memory: VoiceMemory | None = None,
        absorb: str = "none",
        inplace: bool = False,
    ) -> Tensor:
        """The residual stream with what the voices add to it.

        Args:
            x: video tokens [B, N, dim].
            audio: voices [B, P, F, A, dim], in the place of their `memory`.
            weights: [B, P, N] float32, how much of a speaker a token hears.
            spans: the frames of the tokens.
            memory: what `memory` made of the voices.
            absorb: as in `memory`; of `audio` only.
            inplace: x may be overwritten; only where no gradient is needed.
        """
        if memory is None:
            assert audio is not None
            memory = self.memory(audio, "none" if torch.is_grad_enabled() else absorb)
        y = self.norm2(x).to(memory.k.dtype)
        placed = place_spans(spans, x.shape[1], memory.k.shape[1 if memory.k.dim() == 4 else 2])
        if memory.k.dim() == 6:
            q = self.to_q(y).unsqueeze(2)
            parts = [
                ops.audio_attention(
                    cut(q, span.tokens), memory.k[:, :, span.frames], memory.v[:, :, span.frames],
                    span.tokens_per_frame, span.token_offset, weights=weights[:, :, span.tokens],
                )
                for span in placed
            ]  # fmt: skip
            added = self.to_out((parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(2))
            return x.add_(added) if inplace else (x + added).to(x.dtype)
        results = []
        for span in placed:
            place = span.tokens_per_frame, span.token_offset
            scores = _frame_product(cut(y, span.tokens), memory.k[:, span.frames], *place)
            shares = self._shares(scores, weights[:, :, span.tokens], memory.tokens)
            stream = cut(x, span.tokens)
            results.append(_frame_product(shares, memory.v[:, span.frames], *place, stream, inplace))
        return results[0] if len(results) == 1 else torch.cat(results, dim=1)

    def _shares(self, scores: Tensor, weights: Tensor, tokens: int) -> Tensor:
        """Weights of all audio tokens [B, n, K] from their scores [B, n, K] and those of the speakers [B, P, n]."""
        speakers = weights.shape[1]
        each = scores[..., : speakers * tokens].unflatten(-1, (speakers, tokens))
        each = (each.to(wide(scores.dtype)) * self.inner**-0.5).softmax(-1) * weights.transpose(1, 2)[..., None]
        shares = each.flatten(2).to(scores.dtype)
        return F.pad(shares, (0, scores.shape[2] - shares.shape[2]))


def _frame_product(
    x: Tensor,
    weight: Tensor,
    tokens_per_frame: int,
    token_offset: int,
    residual: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """x [B, n, K] with the matrix of its frame [B, F, K, C], added to a residual [B, n, C]."""
    given = (x, weight, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return ops.frame_linear_reference(x, weight, tokens_per_frame, residual=residual, token_offset=token_offset)
    if residual is not None and residual.dtype not in (weight.dtype, wide(weight.dtype)):
        product = ops.frame_linear(x, weight, tokens_per_frame, token_offset=token_offset)
        return residual.add_(product) if inplace else residual + product
    out = residual if inplace else None
    return ops.frame_linear(x, weight, tokens_per_frame, residual=residual, token_offset=token_offset, out=out)


def speaker_weights(
    masks: Tensor | None, strength: Tensor | None, speakers: int, size: tuple[int, int, int, int]
) -> Tensor:
    """How much of every speaker each video token hears: [B, P, T * h * w] float32.

    Masks of several speakers that add up to more than one in a token are scaled down to one, before the strength. That
    of a speaker alone overlaps with none and is taken as it is, as in the released model.

    Args:
        masks: [B, P, 1 or T, H, W] in 0..1, or None: everybody is heard everywhere.
        strength: [B, P], or None for 1.
        speakers: P.
        size: (B, T, h, w) of the video tokens. Masks are read at the nearest place.
    """
    batch, frames, rows, columns = size
    if masks is None:
        device = None if strength is None else strength.device
        weights = torch.ones(batch, speakers, frames * rows * columns, device=device)
    else:
        small = F.interpolate(masks.float(), size=(masks.shape[2], rows, columns), mode="nearest")
        weights = small.expand(-1, -1, frames, -1, -1).flatten(2)
    if speakers > 1:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    return weights if strength is None else weights * strength.float()[..., None]
