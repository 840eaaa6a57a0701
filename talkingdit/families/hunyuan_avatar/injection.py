# SPDX-License-Identifier: Apache-2.0
"""How the picture of the character reaches the model (arXiv:2505.20156, section 3.2 and figure 3).

Three ways, each a switch of the configuration, in any combination:

(a) reference_tokens: it stands as a frame of its own in the sequence, at time -1;
(b) reference_channels: repeated over time, it lies behind the channels of the noisy latents;
(c) reference_projection: repeated over time, it goes through a tokenizer of its own (`ref_in`, which begins as a copy
    of the video's) and a fully connected layer (`before_proj`), and is added to the video tokens (equation 1).

The released model has (a) and (c).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from talkingdit.nn.layers import PatchConv3d


class PatchEmbed(nn.Module):
    """The patch embedding under its name in checkpoints."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.proj = PatchConv3d(channels, dim, (1, 2, 2))

    def forward(self, latents: Tensor, tokens: tuple[int, int] | None = None) -> Tensor:
        """[B, channels, T, H, W] -> the tokens begin .. end of [B, T * H/2 * W/2, dim]."""
        return self.proj(latents, tokens)


def copy_bias(source: nn.Module, target: nn.Module) -> None:
    """Give a layer the bias of another one."""
    assert isinstance(source.bias, Tensor)
    assert isinstance(target.bias, Tensor)
    target.bias.copy_(source.bias)


def over_time(reference: Tensor, frames: int) -> Tensor:
    """A reference [B, C, 1 or T, H, W] with as many latent frames as the video; one is repeated."""
    return reference.expand(-1, -1, frames, -1, -1) if reference.shape[2] == 1 else reference


def with_channels(config: Any, latents: Tensor, reference: Tensor | None) -> Tensor:
    """Latents as the video's patch embedding takes them: with (b), the reference behind their channels or zeros."""
    if not config.reference_channels:
        return latents
    if reference is None:
        return torch.cat([latents, torch.zeros_like(latents)], dim=1)
    return torch.cat([latents, over_time(reference, latents.shape[2]).to(latents.dtype)], dim=1)
