# SPDX-License-Identifier: Apache-2.0
"""The audio branch of Gloria (section 4.2): speech features in windows of a latent frame, attended inside of blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from talkingdit.families.wan_s2v.blocks import BlockInputs
from talkingdit.nn.audio_cross_attention import AudioCrossAttention
from talkingdit.nn.layers import Float32Linear, wide
from talkingdit.nn.ranges import scatter_ranges, take_ranges

WINDOW = 4  # features per latent frame: the temporal compression of the autoencoder


class AudioProjection(nn.Module):
    """Features of all layers of a speech encoder to audio tokens, in windows; float32 throughout.

    Args:
        audio_dim, audio_layers: width and number of layers of the features.
        width: of the tokens.
    """

    def __init__(self, audio_dim: int, audio_layers: int, width: int):
        super().__init__()
        self.layers = nn.Parameter(torch.zeros(audio_layers))  # of a softmax: begins with their mean
        self.project = nn.Sequential(nn.LayerNorm(audio_dim, elementwise_affine=False), Float32Linear(audio_dim, width))
        self.place = nn.Parameter(torch.zeros(WINDOW, width))  # of a token in its window, which attention does not see

    def forward(self, features: Tensor) -> Tensor:
        """[B, audio_layers, audio_dim, 4 T] -> [B, T, 4, width]."""
        dtype = wide(features.dtype)
        with torch.autocast(features.device.type, enabled=False):
            mixed = torch.einsum("blcn,l->bnc", features.to(dtype), self.layers.to(dtype).softmax(0))
            return self.project(mixed).unflatten(1, (-1, WINDOW)) + self.place.to(dtype)


class WindowAttention(AudioCrossAttention):
    """Attention of the noisy tokens of a latent frame to its window of audio tokens, with its own output projection.

    Args:
        dim, num_heads, eps: as of the model.
        width: of the audio tokens.
    """

    def __init__(self, dim: int, num_heads: int, width: int, eps: float):
        super().__init__(dim, num_heads, eps)
        self.k = nn.Linear(width, dim)
        self.v = nn.Linear(width, dim)

    def forward(self, y: Tensor, audio: Tensor, inputs: BlockInputs) -> Tensor:  # type: ignore[override]
        """See `talkingdit.families.wan_i2v.blocks.AudioAttention`; audio [B, F, 4, width]."""
        shard = inputs.shard
        assert shard is not None
        heard = super().forward(take_ranges(y, shard.noisy_ranges), shard.frame_spans, audio)
        return scatter_ranges(heard, shard.noisy_ranges, y.shape[1])
