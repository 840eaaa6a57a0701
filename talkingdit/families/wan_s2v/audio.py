# SPDX-License-Identifier: Apache-2.0
"""Audio in Wan-S2V (arXiv:2508.18621): speech features to audio tokens per latent frame, and on into the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.nn.audio_cross_attention import AudioCrossAttention, AudioMemory, FrameSizes, cut, place_spans
from talkingdit.nn.layers import Conv1d, Float32Linear, LayerNorm, lend, wide

# Audio features per latent frame: the causal convolutions halve the rate twice.
FEATURES_PER_LATENT = 4
# A latent frame i sees the features 4i - 5 .. 4i + 3: this many lie before the first feature of the clip.
LOOK_BACK = 5


class CausalConv1d(nn.Module):
    """Convolution over time that sees no future: the first frame is repeated in front. Channels last, float32.

    Input [B, n, channels_in], output [B, ceil(n / stride), channels_out].
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        self.conv = Conv1d(channels_in, channels_out, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = lend(self.conv)
        return causal_conv(x, weight, bias, self.conv.stride[0])


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """The convolution of `CausalConv1d` as one matrix product: x [B, n, C], weight [out, C, kernel]."""
    kernel = weight.shape[2]
    x = torch.cat([x[:, :1].expand(-1, kernel - 1, -1), x], dim=1)
    windows = x.unfold(1, kernel, stride).flatten(2)
    return F.linear(windows, weight.flatten(1).to(x.dtype), None if bias is None else bias.to(x.dtype))


class AudioTokenizer(nn.Module):
    """Causal convolutions from speech features to audio tokens, one group per latent frame.

    Args:
        channels_in: channels of the features.
        dim: width of the transformer, a multiple of 4.
        num_token: tokens per latent frame; a learned one is appended to them.
        need_global: also make the one vector per frame that drives adaptive normalisation.
    """

    def __init__(self, channels_in: int, dim: int, num_token: int, need_global: bool):
        super().__init__()
        self.num_token = num_token
        self.conv1_local = CausalConv1d(channels_in, dim // 4 * num_token)
        self.conv2 = CausalConv1d(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv1d(dim // 2, dim, stride=2)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.conv1_global: CausalConv1d | None = None
        self.final_linear: Float32Linear | None = None
        if need_global:
            self.conv1_global = CausalConv1d(channels_in, dim // 4)
            self.final_linear = Float32Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, n, channels_in] float32 -> tokens [B, F, num_token + 1, dim], global vectors [B, F, dim] or None.

        F = ceil(n / 4). The branch of the global vector shares all but its first convolution with the tokens', so both
        go through them as one batch.
        """
        branches = self.num_token
        y = self.conv1_local(x)
        if self.conv1_global is not None:
            y = torch.cat([y, self.conv1_global(x)], dim=-1)
            branches += 1
        b, n = y.shape[:2]
        y = y.view(b, n, branches, -1).transpose(1, 2).flatten(0, 1)
        y = _norm_silu(y)
        y = _norm_silu(self.conv2(y))
        y = _norm_silu(self.conv3(y))
        y = y.view(b, branches, *y.shape[1:]).transpose(1, 2)
        padding = self.padding_tokens.to(y.dtype).expand(b, y.shape[1], -1, -1)
        tokens = torch.cat([y[:, :, : self.num_token], padding], dim=2)
        if self.final_linear is None:
            return tokens, None
        return tokens, self.final_linear(y[:, :, self.num_token])


def _norm_silu(x: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6))


class CausalAudioEncoder(nn.Module):
    """Learned weighted mean over the layers of a speech encoder, then the `AudioTokenizer`. Float32 throughout."""

    def __init__(self, audio_dim: int, dim: int, num_layers: int, num_token: int, need_global: bool):
        super().__init__()
        self.weights = nn.Parameter(torch.full((1, num_layers, 1, 1), 0.01))
        self.encoder = AudioTokenizer(audio_dim, dim, num_token, need_global)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [B, layers, audio_dim, n] -> tokens [B, F, num_token + 1, dim], globals [B, F, dim].

        F = ceil(n / 4).
        """
        dtype = wide(features.dtype)
        with torch.autocast(features.device.type, enabled=False):
            weights = F.silu(self.weights.to(dtype).flatten())
            mixed = torch.einsum("blcn,l->bnc", features.to(dtype), weights / weights.sum())
            return self.encoder(mixed)

    def clip_tokens(self, audio: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens of a clip: audio [B, layers, audio_dim, 4F] -> tokens [B, F, num_token + 1, dim], globals [B, F, dim].

        Latent frame i sees the features 4i - 5 .. 4i + 3. In front of the clip stand the last features of `history`
        [B, layers, audio_dim, n], continued to the past by repeating its first one; without history the first feature
        of the clip is repeated, as the official program does. (That program repeats it 73 times for its 73 motion
        frames, of which the convolutions see five.)
        """
        tokens, vectors = self(_with_past(audio, history))
        return tokens[:, 2:], None if vectors is None else vectors[:, 2:]

    def tokens_of_clips(
        self, audio: Sequence[Tensor], history: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """`clip_tokens` of clips of different lengths, of one sample each, in one call of the module.

        They are stacked with zeros behind the shorter ones, which nothing in front of them sees.
        """
        given = [_with_past(one, past) for one, past in zip(audio, history, strict=True)]
        longest = max(one.shape[-1] for one in given)
        tokens, vectors = self(torch.cat([F.pad(one, (0, longest - one.shape[-1])) for one in given]))
        ends = [2 + one.shape[-1] // FEATURES_PER_LATENT for one in audio]

        def cut(whole: Tensor) -> list[Tensor]:
            return [whole[i : i + 1, 2:end] for i, end in enumerate(ends)]

        return cut(tokens), None if vectors is None else cut(vectors)


def _with_past(audio: Tensor, history: Tensor | None) -> Tensor:
    """Features of a clip with the `LOOK_BACK` features in front of it, see `CausalAudioEncoder.clip_tokens`."""
    past = audio[..., :1] if history is None else history[..., -LOOK_BACK:]
    past = torch.cat([past[..., :1].expand(-1, -1, -1, LOOK_BACK - past.shape[-1]), past.to(audio.dtype)], dim=-1)
    return torch.cat([past, audio], dim=-1)


class AdaLayerNorm(nn.Module):
    """Projection of a global audio vector to shift and scale, for the layer norm before audio attention (eps 1e-5)."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F, dim] -> shift, scale [B, F, dim]."""
        shift, scale = self.linear(F.silu(vectors)).chunk(2, dim=-1)
        return shift, scale


@dataclass(frozen=True)
class Injection:
    """One of the injections of audio, and how it is computed."""

    index: int  # which
    frames: FrameSizes  # tokens per frame, or the spans of a shard or a packed sequence
    dtype: torch.dtype  # of the linear layers, and of the result
    absorb: str = "none"  # see `AudioCrossAttention.memory`
    inplace: bool = False  # for inference: add to the residual stream in place


class AudioInjector(nn.Module):
    """Audio attention of the noisy tokens, added to the residual stream after chosen blocks."""

    def __init__(self, dim: int, num_heads: int, layers: Sequence[int], enable_adain: bool, adain_mode: str):
        super().__init__()
        self.index = {block: i for i, block in enumerate(layers)}
        self.injector = nn.ModuleList([AudioCrossAttention(dim, num_heads) for _ in layers])
        self.adain = enable_adain and adain_mode == "attn_norm"
        if enable_adain:
            self.injector_adain_layers = nn.ModuleList([AdaLayerNorm(dim) for _ in layers])
            if adain_mode != "attn_norm":
                # The official forward never uses these, but its checkpoints of this mode have them.
                self.injector_adain_output_layers = nn.ModuleList([nn.Linear(dim, dim) for _ in layers])
        self.norm = LayerNorm(dim, eps=1e-6, elementwise_affine=False)

    def shift_scale(self, index: int, vectors: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Shift and scale [B, F, dim] of one injection, None where it has plain layer norm."""
        if not self.adain:
            return None
        assert vectors is not None
        return self.injector_adain_layers[index](vectors)

    def forward(
        self,
        x: Tensor,
        injection: Injection,
        tokens: Tensor | None,
        shift_scale: tuple[Tensor, Tensor] | None,
        memory: AudioMemory | None = None,
    ) -> Tensor:
        """What audio adds to the noisy tokens x [B, N, dim] of the residual stream; in place, their sum in x itself.

        Args:
            tokens: [B, F, A, dim], in the place of their `memory`.
            shift_scale: [B, F, dim] each, from `shift_scale`.
            memory: from `AudioCrossAttention.memory`.
        """
        if shift_scale is None:
            normed = self.norm(x).to(injection.dtype)
        else:
            shift, scale = shift_scale
            parts = [
                ops.norm_modulate(
                    cut(x, span.tokens), cut(scale, span.frames), cut(shift, span.frames), span.tokens_per_frame, 1e-5,
                    span.token_offset, injection.dtype,
                )
                for span in place_spans(injection.frames, x.shape[1], shift.shape[1])
            ]  # fmt: skip
            normed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        stream = {"residual": x, "out": x} if injection.inplace else {}
        return self.injector[injection.index](normed, injection.frames, tokens, memory, injection.absorb, **stream)
