# SPDX-License-Identifier: Apache-2.0
"""The emotion module (arXiv:2505.20156, section 3.4): the face shows what a reference picture shows.

Every latent frame may follow a reference of its own or none, so that the emotion can change over a video, which the
paper names as a limit of its single reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from talkingdit.nn.attention import attention
from talkingdit.nn.layers import LayerNorm, PatchConv3d

KeyValue = tuple[Tensor, Tensor]


class Scene(NamedTuple):
    """Video tokens of one sample here that follow one reference."""

    sample: int
    tokens: slice  # of the video tokens here
    reference: int


class EmotionEmbedder(nn.Module):
    """Latents of reference pictures to tokens: patches through a fully connected layer."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.proj = PatchConv3d(channels, dim, (1, 2, 2))
        self.fc = nn.Linear(dim, dim)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, E, channels, 1, H, W] -> [B, E, h * w, dim]."""
        return self.fc(self.proj(latents.flatten(0, 1))).unflatten(0, latents.shape[:2])


class EmotionAdapter(nn.Module):
    """Attention of the video tokens of a frame to those of its reference, with a learned scale.

    Args:
        dim: of the tokens.
        num_heads: of the attention.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = LayerNorm(dim, eps=1e-5)  # of the reference
        self.norm2 = LayerNorm(dim, eps=1e-5)  # of the video
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def memory(self, emotion: Tensor) -> KeyValue:
        """Keys and values [B, E, n, H, D] of the references [B, E, n, dim]."""
        k, v = self.to_kv(self.norm1(emotion)).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return k, v

    def forward(
        self,
        x: Tensor,
        emotion: Tensor | None,
        strength: Tensor,
        scenes: Sequence[Scene],
        memory: KeyValue | None = None,
    ) -> Tensor:
        """The residual stream with what the references add to it.

        Args:
            x: video tokens [B, N, dim].
            emotion: [B, E, n, dim], in the place of their `memory`.
            strength: [B, E] float32.
            scenes: which tokens follow which reference; others are left as they are.
            memory: what `memory` made of the references.
        """
        if memory is None:
            assert emotion is not None
            memory = self.memory(emotion)
        k, v = memory
        if not scenes:  # the weights must get their gradient on every process, also where no token follows a reference
            scenes = [Scene(0, slice(0, 0), 0)]
        rows = []
        for sample in range(x.shape[0]):
            parts, filled = [], 0
            for scene in scenes:
                if scene.sample != sample:
                    continue
                parts.append(x[sample : sample + 1, filled : scene.tokens.start])
                part = x[sample : sample + 1, scene.tokens]
                q = self.to_q(self.norm2(part).to(k.dtype)).unflatten(-1, (self.num_heads, -1))
                one = slice(sample, sample + 1)
                y = self.to_out(attention(q, k[one, scene.reference], v[one, scene.reference]).flatten(2))
                factor = self.scale * strength[sample, scene.reference]
                parts.append((part + factor * y).to(x.dtype))
                filled = scene.tokens.stop
            parts.append(x[sample : sample + 1, filled:])
            rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows)


def scenes_of(
    index: Sequence[Sequence[int]], per_frame: int, begin: int, end: int, place: int = 0, sample: int = 0
) -> list[Scene]:
    """Runs of frames that follow one reference, as ranges of the video tokens here.

    Args:
        index: per sample, the reference of every latent frame, -1 for none.
        per_frame: video tokens of a frame.
        begin, end: the video tokens of the clip that are here.
        place: of the first of them among all video tokens here.
        sample: of the first clip.
    """
    scenes = []
    for number, row in enumerate(index, start=sample):
        frame = 0
        while frame < len(row):
            stop = frame + 1
            while stop < len(row) and row[stop] == row[frame]:
                stop += 1
            first, last = max(frame * per_frame, begin), min(stop * per_frame, end)
            if row[frame] >= 0 and first < last:
                scenes.append(Scene(number, slice(place + first - begin, place + last - begin), row[frame]))
            frame = stop
    return scenes
