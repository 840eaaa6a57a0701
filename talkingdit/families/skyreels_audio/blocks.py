# SPDX-License-Identifier: Apache-2.0
"""What SkyReels-Audio adds to a block: attention to the voice, behind that to text and picture, with rotary time."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.families.wan_s2v.blocks import BlockInputs
from talkingdit.nn.audio_cross_attention import CrossAttention, cut, place_spans
from talkingdit.nn.ranges import Range, scatter_ranges, take_ranges
from talkingdit.ops import HeardTokens, heard_tokens


@functools.lru_cache(maxsize=64)
def heard(frames: tuple[int, ...], per_frame: int, window: int | None) -> tuple[HeardTokens, ...]:
    """`heard_tokens` of clips of so many latent frames, all filled up to the K of the one that hears most."""
    each = [heard_tokens(count, per_frame, window) for count in frames]
    most = max(one.tokens.shape[1] for one in each)

    def filled(x: Tensor) -> Tensor:
        return torch.cat([x, x[:, -1:].expand(-1, most - x.shape[1])], dim=1)

    return tuple(HeardTokens(filled(one.tokens), filled(one.positions), one.lens) for one in each)


@functools.lru_cache(maxsize=64)
def _here(
    frames: tuple[int, ...], local: tuple[Range, ...], per_frame: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Positions [F, K] and numbers [F] of the audio tokens that the frames of this process hear."""
    parts = [
        (one.positions[begin:end], one.lens[begin:end])
        for one, (begin, end) in zip(heard(frames, per_frame, window), local, strict=True)
        if begin < end
    ]
    positions, lens = zip(*parts, strict=True)
    return torch.cat(positions), torch.cat(lens)


class AudioRopeAttention(CrossAttention):
    """Attention of video tokens to the audio tokens that their latent frame hears, with rotary time (section 2.2).

    What it adds begins at zero: its output projection does, so that a video model begins as it was.

    Args:
        dim, num_heads, eps: as of the model; q and k are normalised as in its other attention.
        per_frame: audio tokens of a latent frame.
        window: latent frames on each side that are heard; None hears the whole clip.
        theta: base of the frequencies; 0 for no rotary time.
    """

    def __init__(self, dim: int, num_heads: int, eps: float, per_frame: int, window: int | None, theta: float):
        super().__init__(dim, num_heads, eps)
        self.per_frame, self.window, self.theta = per_frame, window, theta

    def begin_silent(self) -> None:
        nn.init.zeros_(self.o.weight)
        if self.o.bias is not None:
            nn.init.zeros_(self.o.bias)

    def forward(self, y: Tensor, audio: Tensor, inputs: BlockInputs) -> Tensor:
        """See `talkingdit.families.wan_i2v.blocks.AudioAttention`; audio [B, F, K, dim]."""
        shard = inputs.shard
        assert shard is not None
        q = self.query(take_ranges(y, shard.noisy_ranges))
        k, v = self.key_value(audio)
        positions, lens = self._times(tuple(clip.grid[0] for clip in shard.clips), shard.clip_frames)
        lens = lens.to(q.device).expand(len(q), -1)
        if not self.theta:
            positions = torch.zeros_like(positions)
        attended = [
            ops.audio_rope_attention(
                cut(q, span.tokens),
                cut(k, span.frames),
                cut(v, span.frames),
                positions[span.frames],
                *span.place,
                kv_lens=cut(lens, span.frames),
                theta=self.theta or 1.0,
            )
            for span in place_spans(shard.frame_spans, q.shape[1], k.shape[1])
        ]
        found = self.o((attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)).flatten(2))
        return scatter_ranges(found, shard.noisy_ranges, y.shape[1])

    @torch.compiler.disable
    def _times(self, frames: tuple[int, ...], local: tuple[Range, ...]) -> tuple[Tensor, Tensor]:
        if all(begin == end for begin, end in local):  # a process without noisy tokens runs its layers all the same
            local = ((0, 1), *local[1:])
        return _here(frames, local, self.per_frame, self.window)
