# SPDX-License-Identifier: Apache-2.0
"""The block of Wan I2V: that of the other Wan models, with attention to a picture and to audio beside the text."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from talkingdit.families.wan_s2v.blocks import BlockInputs, TextCrossAttention, WanBlock, attend_clips
from talkingdit.families.wan_s2v.conditions import KeyValue
from talkingdit.nn.layers import LayerNorm, RMSNorm
from talkingdit.ops import EightBitRows


class AudioAttention(Protocol):
    """What a family puts into blocks to hear audio: a module that is called so, see `WanI2VModel.audio_attention`."""

    def __call__(self, y: Tensor, audio: Tensor, inputs: BlockInputs) -> Tensor:
        """What audio adds to y [B, N, dim], the tokens of this process, normalised: [B, N, dim].

        Args:
            audio: what `WanI2VModel.encode_audio` made, of the latent frames that noisy tokens here are in.
            inputs: with the shard; `inputs.shard.noisy_ranges` and `frame_spans` say which tokens are of which frame.
        """


class ImageEmbedding(nn.Module):
    """Features [B, L, image_dim] of a picture to tokens [B, L, dim]."""

    def __init__(self, image_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(image_dim, eps=1e-5),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            LayerNorm(dim, eps=1e-5),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


class TextImageCrossAttention(TextCrossAttention):
    """Attention of every token to the text and, apart and with the same queries, to a picture's tokens; their sum."""

    def __init__(self, dim: int, num_heads: int, eps: float, image: bool):
        super().__init__(dim, num_heads, eps)
        self.image = image
        if image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def image_key_value(self, tokens: Tensor) -> KeyValue:
        """[B, L, dim] -> k and v [B, L, heads, head_dim]; independent of the timestep."""
        k = self.norm_k_img(self.k_img(tokens)).unflatten(-1, (self.num_heads, -1))
        return k, self.v_img(tokens).unflatten(-1, (self.num_heads, -1))

    def forward(
        self,
        x: Tensor | EightBitRows,
        text: Tensor,
        inputs: BlockInputs,
        key_value: KeyValue | None = None,
        image: Tensor | None = None,
        image_key_value: KeyValue | None = None,
    ) -> Tensor:
        """As of `TextCrossAttention`, with a picture's tokens [B, L, dim] (or its `image_key_value`)."""
        q = self.query(x)
        y = attend_clips(q, self.key_value(text) if key_value is None else key_value, inputs, inputs.text_mask)
        if image is not None:
            pair = self.image_key_value(image) if image_key_value is None else image_key_value
            y = y + attend_clips(q, pair, inputs)
        return self.o(y)


class WanI2VBlock(WanBlock):
    """A block with attention to text, picture and, in chosen blocks, audio, all from one norm, each added.

    Args:
        dim, ffn_dim, num_heads, eps: as of the model.
        image: with attention to a picture.
        audio_attn: an `AudioAttention`; None in blocks that do not hear.
    """

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, eps: float, image: bool, audio_attn: nn.Module | None = None
    ):
        super().__init__(dim, ffn_dim, num_heads, eps, TextImageCrossAttention(dim, num_heads, eps, image))
        self.audio_attn = audio_attn

    def attend_context(
        self,
        y: Tensor,
        text: Tensor,
        inputs: BlockInputs,
        text_kv: KeyValue | None = None,
        image: Tensor | None = None,
        image_kv: KeyValue | None = None,
        audio: Tensor | None = None,
    ) -> Tensor:
        """Attention to text and picture, and that to audio with an output projection of its own."""
        seen = self.cross_attn(y, text, inputs, text_kv, image, image_kv)
        return seen if self.audio_attn is None else seen + self.audio_attn(y, audio, inputs)
