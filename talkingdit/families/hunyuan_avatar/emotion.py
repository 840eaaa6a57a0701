# SPDX-License-Identifier: Apache-2.0
"""The emotion module (arXiv:2505.20156, section 3.4): the face shows what a reference picture shows.

Every latent frame may follow a reference of its own or none, so that the emotion can change over a video, which the
paper names as a limit of its single reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from talkingdit.nn.attention import attention
from talkingdit.nn.layers import LayerNorm, PatchConv3d

KeyValue = tuple[Tensor, Tensor]


class SceneTokens(NamedTuple):
    """Video tokens of one sample here that follow one reference."""

    sample: int
    tokens: slice  # of the video tokens here
    reference: int
    grid: tuple[int, int]  # rows and columns of tokens in a frame
    first: int = 0  # place of the first of these tokens in its frame


def places(rows: int, columns: int, dim: int, device: torch.device) -> Tensor:
    """Where the tokens of a picture are, as sines and cosines [rows * columns, dim] float32.

    Attention alone would take the reference for a bag of patches. Places count in shares of the height and the width,
    so a reference of any size fits a video of any size; frequencies run from a quarter of a turn over the picture to 8
    turns. They are twice as large as sines, so that they count beside what a patch shows.
    """
    turns = 2 * math.pi * torch.logspace(-2, 3, dim // 4, base=2.0, device=device)
    axes = []
    for count in (rows, columns):
        angle = ((torch.arange(count, device=device) + 0.5) / count)[:, None] * turns
        axes.append(2 * torch.cat([angle.sin(), angle.cos()], dim=1))
    down, across = axes[0][:, None].expand(-1, columns, -1), axes[1][None].expand(rows, -1, -1)
    found = torch.cat([down, across], dim=2).flatten(0, 1)
    return nn.functional.pad(found, (0, dim - found.shape[1]))


class EmotionEmbedder(nn.Module):
    """Latents of reference pictures to tokens that know their places: patches through a fully connected layer."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.proj = PatchConv3d(channels, dim, (1, 2, 2))
        self.fc = nn.Linear(dim, dim)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, E, channels, 1, H, W] -> [B, E, h * w, dim]."""
        tokens = self.fc(self.proj(latents.flatten(0, 1)))
        where = places(latents.shape[-2] // 2, latents.shape[-1] // 2, tokens.shape[-1], tokens.device)
        return (tokens + where.to(tokens.dtype)).unflatten(0, latents.shape[:2])


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

    def look_at_own_place(self) -> None:
        """Begin with keys that are made as queries are: a token then attends to its own place in the reference."""
        with torch.no_grad():
            self.to_kv.weight[: self.to_q.out_features].copy_(self.to_q.weight)

    def memory(self, emotion: Tensor) -> KeyValue:
        """Keys and values [B, E, n, H, D] of the references [B, E, n, dim]."""
        k, v = self.to_kv(self.norm1(emotion)).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return k, v

    def forward(
        self,
        x: Tensor,
        emotion: Tensor | None,
        strength: Tensor,
        scenes: Sequence[SceneTokens],
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
            scenes = [SceneTokens(0, slice(0, 0), 0, (1, 1))]
        rows = []
        for sample in range(x.shape[0]):
            parts, filled = [], 0
            for scene in scenes:
                if scene.sample != sample:
                    continue
                parts.append(x[sample : sample + 1, filled : scene.tokens.start])
                part = x[sample : sample + 1, scene.tokens]
                asks = self.norm2(part) + self._where(scene, part)
                q = self.to_q(asks.to(k.dtype)).unflatten(-1, (self.num_heads, -1))
                one = slice(sample, sample + 1)
                y = self.to_out(attention(q, k[one, scene.reference], v[one, scene.reference]).flatten(2))
                factor = self.scale * strength[sample, scene.reference]
                parts.append((part + factor * y).to(x.dtype))
                filled = scene.tokens.stop
            parts.append(x[sample : sample + 1, filled:])
            rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows)

    def _where(self, scene: SceneTokens, tokens: Tensor) -> Tensor:
        """Places of these tokens [1, n, dim] in their frames."""
        table = places(*scene.grid, tokens.shape[-1], tokens.device).to(tokens.dtype)
        index = (scene.first + torch.arange(tokens.shape[1], device=tokens.device)) % len(table)
        return table[index]


def scenes_of(
    index: Sequence[Sequence[int]], grid: tuple[int, int], begin: int, end: int, place: int = 0, sample: int = 0
) -> list[SceneTokens]:
    """Runs of frames that follow one reference, as ranges of the video tokens here.

    Args:
        index: per sample, the reference of every latent frame, -1 for none.
        grid: rows and columns of the video tokens of a frame.
        begin, end: the video tokens of the clip that are here.
        place: of the first of them among all video tokens here.
        sample: of the first clip.
    """
    scenes, per_frame = [], grid[0] * grid[1]
    for number, row in enumerate(index, start=sample):
        frame = 0
        while frame < len(row):
            stop = frame + 1
            while stop < len(row) and row[stop] == row[frame]:
                stop += 1
            first, last = max(frame * per_frame, begin), min(stop * per_frame, end)
            if row[frame] >= 0 and first < last:
                tokens = slice(place + first - begin, place + last - begin)
                scenes.append(SceneTokens(number, tokens, row[frame], grid, first % per_frame))
            frame = stop
    return scenes
