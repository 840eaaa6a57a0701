# SPDX-License-Identifier: Apache-2.0
"""What the transformers of the Wan models have in common around their blocks: time, shards, patches, step caches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from talkingdit.families.wan_s2v.sequence import SequenceShard
from talkingdit.families.wan_s2v.timesteps import StepTime
from talkingdit.nn.context_parallel import gather
from talkingdit.nn.hooks import like_forward
from talkingdit.nn.layers import timestep_embedding
from talkingdit.nn.ranges import scatter_ranges, take_ranges

if TYPE_CHECKING:
    from talkingdit.families.wan_s2v.blocks import Head
    from talkingdit.pipelines.step_cache import BlockCache


class WanTrunk(nn.Module):
    """A Wan transformer of one sequence: noisy tokens of one or more clips, each with clean tokens behind them.

    A model gives `_embed` and `_through_blocks`, and has the layers that are named here. It is a model of diffusers by
    `diffusers_model.py`, or has none of that (`talkingdit.nn.configured`).
    """

    gradient_checkpointing: bool
    _gradient_checkpointing_func: Any

    if TYPE_CHECKING:
        config: Any  # a frozen dictionary with attribute access
        head: Head
        patch_embedding: Any
        text_embedding: nn.Module
        time_embedding: nn.Module
        time_projection: nn.Module

        def _embed(self, latents: Sequence[Tensor], conditions: Any) -> Tensor:
            """The residual stream [B, N, dim] in front of the first block."""

        def _through_blocks(self, x: Tensor, time: StepTime, conditions: Any) -> Tensor:
            """The residual stream [B, N, dim] behind the last block; without gradients x is written over."""

    def init_weights(self) -> None:
        """Random weights by the official scheme; the head gives zero."""
        for name in ("blocks", "text_embedding", "time_embedding", "time_projection", "img_emb"):
            module = getattr(self, name, None)
            for linear in () if module is None else module.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.xavier_uniform_(linear.weight)
                    if linear.bias is not None:
                        nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for module in (self.text_embedding, self.time_embedding):
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
        nn.init.zeros_(self.head.head.bias)

    @like_forward
    def step_inputs(self, timesteps: Tensor, projected: bool = False) -> Tensor:
        """What the blocks are given of timesteps [S]: the time embedding [S, dim], or its projections [S, 6, dim]."""
        return self.embed_time(timesteps[:, None].float())[int(projected)][:, 0]

    def _denoise(
        self,
        latents: Sequence[Tensor],
        time: StepTime,
        conditions: Any,
        cache: BlockCache | None = None,
    ) -> list[Tensor]:
        """Velocities [B, out_dim, T, H, W] of the clips of a sequence, from their latents [B, C, T, H, W]."""
        shard: SequenceShard = conditions.shard
        x = self._embed(latents, conditions)
        length = x.shape[1]
        if cache is None:
            noisy = take_ranges(self._through_blocks(x, time, conditions), shard.noisy_ranges)
        elif cache.skips:
            assert cache.kept is not None
            noisy = take_ranges(x, shard.noisy_ranges) + cache.kept
        else:
            before = take_ranges(x, shard.noisy_ranges).clone()  # blocks write over x
            noisy = take_ranges(self._through_blocks(x, time, conditions), shard.noisy_ranges)
            cache.keep(noisy - before)
        del x
        y = self.head(noisy, time.head, time.head_groups, shard.noisy_offset)
        begins = [clip.begin for clip in shard.clips]
        if shard.context is not None:
            y = gather(scatter_ranges(y, shard.noisy_ranges, length), shard.context, shard.tokens)
        elif shard.packed:
            begins = list(itertools.accumulate((clip.noisy for clip in shard.clips), initial=0))
        return [
            self._unpatchify(y[:, begin : begin + clip.noisy], clip.grid)
            for begin, clip in zip(begins, shard.clips, strict=False)
        ]

    def _unpatchify(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches [B, F*S, 4 * out_dim] -> latents [B, out_dim, T, H, W]."""
        frames, rows, columns = grid
        y = y.reshape(y.shape[0], frames, rows, columns, 2, 2, self.config.out_dim)
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(y.shape[0], self.config.out_dim, frames, 2 * rows, 2 * columns)

    def _run(self, module: nn.Module, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            assert self._gradient_checkpointing_func is not None  # enable_gradient_checkpointing sets it
            return self._gradient_checkpointing_func(module, *arguments)
        return module(*arguments)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding [B, G, dim] of timesteps [B, G], and its six projections [B, G, 6, dim]."""
        with torch.autocast(timestep.device.type, enabled=False):
            time = self.time_embedding(timestep_embedding(timestep, self.config.freq_dim))
            return time, self.time_projection(time).unflatten(-1, (6, self.config.dim))
