# SPDX-License-Identifier: Apache-2.0
"""Whole videos to latents and back, part by part, with the autoencoder of HunyuanVideo or that of Wan.

What a part of a video needs of the ones before it is small, so that a video of any length is decoded in constant
memory, and decoding can go on in another process. The frames are those of decoding all at once.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from talkingdit.autoencoders import streaming
from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.autoencoders.tail import lookback

WAN_PART = 16  # latents that are decoded at once, for the sake of memory alone


class Codec(Protocol):
    """An autoencoder for pipelines: latents are normalised as the transformer takes them."""

    vae: Any

    def encode(self, video: Tensor) -> Tensor:
        """[1, 3, 4 n - 3, H, W] in -1..1 -> [1, C, n, H / 8, W / 8] float32."""

    def parts(self, count: int) -> list[tuple[int, int]]:
        """First and last latent (not included) of the parts that a video of so many latents is decoded in."""

    def decode(self, latents: Tensor, part: int, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The frames of a part.

        Args:
            latents: [1, C, L, h, w], those of the whole video.
            part: number of the part.
            tail: what decoding the part before gave beside its frames; None for the first part.

        Returns:
            [1, 3, n, 8 h, 8 w] float32 in -1..1, and what the next part needs.
        """


def codec(vae: Any) -> Codec:
    """The codec of an autoencoder of diffusers."""
    return HunyuanCodec(vae) if hasattr(vae, "tile_sample_min_num_frames") else WanCodec(vae)


def still(image: Tensor, latents: int) -> Tensor:
    """A picture [1, 3, 1, H, W] as a video of so many latents that shows nothing else."""
    return image.expand(-1, -1, FRAMES_PER_LATENT * (latents - 1) + 1, -1, -1)


class HunyuanCodec:
    """diffusers' `AutoencoderKLHunyuanVideo`, in its tiles of frames. Their overlaps are blended."""

    def __init__(self, vae: Any):
        self.vae = vae

    @property
    def _tile(self) -> tuple[int, int]:
        """Latents of a tile of frames, and from one to the next."""
        vae = self.vae
        return (
            vae.tile_sample_min_num_frames // FRAMES_PER_LATENT,
            vae.tile_sample_stride_num_frames // FRAMES_PER_LATENT,
        )

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """See `Codec`; the middle of the distribution, where the released program draws from it."""
        posterior = self.vae.encode(video.to(self.vae.device, self.vae.dtype), return_dict=False)[0]
        return posterior.mode().float() * self.vae.config.scaling_factor

    def parts(self, count: int) -> list[tuple[int, int]]:
        whole, step = self._tile
        if count <= whole:
            return [(0, count)]
        ends = [*range(step + 1, count, step), count]
        return list(zip([0, *ends], ends, strict=False))

    @torch.no_grad()
    def decode(self, latents: Tensor, part: int, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        vae = self.vae
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
        whole, step = self._tile
        if latents.shape[2] <= whole:
            return _pixels(vae.decode(latents, return_dict=False)[0]), None
        first, last = self.parts(latents.shape[2])[part]
        video = self._decode_tile(latents[:, :, part * step : part * step + whole + 1])
        count = FRAMES_PER_LATENT * (last - first)
        if part == 0:
            count -= FRAMES_PER_LATENT - 1
        else:
            assert tail is not None
            video = vae.blend_t(tail.to(video), video[:, :, 1:], tail.shape[2])
        shared = FRAMES_PER_LATENT * (whole - step)
        return _pixels(video[:, :, :count]), video[:, :, -min(shared, video.shape[2] - count) :].clone()

    def _decode_tile(self, tile: Tensor) -> Tensor:
        vae = self.vae
        limit = (vae.tile_sample_min_height, vae.tile_sample_min_width)
        ratio = vae.spatial_compression_ratio
        if vae.use_tiling and any(side > most // ratio for side, most in zip(tile.shape[3:], limit, strict=True)):
            return vae.tiled_decode(tile, return_dict=True).sample
        return vae.decoder(vae.post_quant_conv(tile))


class WanCodec:
    """diffusers' `AutoencoderKLWan`, which keeps features of the frames before; they are made again for a part."""

    def __init__(self, vae: Any):
        self.vae = vae
        self._lookback = lookback(vae)

    def encode(self, video: Tensor) -> Tensor:
        return streaming.encode(self.vae, video.to(self.vae.device))

    def parts(self, count: int) -> list[tuple[int, int]]:
        return [(first, min(first + WAN_PART, count)) for first in range(0, count, WAN_PART)]

    def decode(self, latents: Tensor, part: int, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        first, last = self.parts(latents.shape[2])[part]
        latents = latents.to(self.vae.device)
        decoder = streaming.StreamingDecoder(self.vae)
        decoder.resume(latents[:, :, max(0, first - self._lookback) : first])
        return decoder(latents[:, :, first:last]), None


def _pixels(video: Tensor) -> Tensor:
    return video.float().clamp(-1.0, 1.0)
