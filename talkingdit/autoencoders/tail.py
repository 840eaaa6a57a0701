# SPDX-License-Identifier: Apache-2.0
"""Decoding the end of a video without computing all of its beginning, with the same result.

Wan-S2V decodes a clip behind the latents of its history, so that the decoder knows what came before, and keeps the
frames of the clip. The decoder sees no future, and each of its stages sees only so far back: 3.5 latents at full
resolution, 6.5 at the next, and so on down to all of the history where frames are small. So every stage begins as
late as the frames that are kept allow. Behind 19 latents of history the expensive last stages of the Wan 2.1
decoder run 24 and 27 times for 20 latents instead of 39, and nothing but the rounding of the machine can differ.

The stages of diffusers' decoder are called with caches that belong to the call; nothing is kept on the model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT, unpatchify
from talkingdit.autoencoders.streaming import denormalise, feature_caches, is_a

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d

CACHED_FRAMES = 2  # what a causal convolution over three frames remembers


class _Conv:
    """A causal convolution of a stream."""

    def __init__(self, conv: WanCausalConv3d):
        self.conv = conv
        self.seen: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = self.conv(x, self.seen)
        self.seen = (x if self.seen is None else torch.cat([self.seen, x], dim=2))[:, :, -CACHED_FRAMES:].clone()
        return y


class _Stage:
    """A part of the decoder, which changes the number of frames per latent at its end at most.

    Args:
        decoder: the whole decoder.
        number: of the upsampling block; the first stage also holds what is before, the last what is behind.
        rate: frames per latent that come in.
    """

    def __init__(self, decoder: Any, number: int, rate: int):
        blocks = decoder.up_blocks
        self.decoder, self.block = decoder, blocks[number]
        self.first, self.last = number == 0, number == len(blocks) - 1
        self.conv_in = _Conv(decoder.conv_in) if self.first else None
        self.conv_out = _Conv(decoder.conv_out) if self.last else None
        self.modules = [decoder.mid_block, self.block] if self.first else [self.block]
        self.caches = [feature_caches(part) for part in self.modules]
        doubles = any(is_a(m, "WanResample") and m.mode == "upsample3d" for m in self.block.modules())
        self.rate, self.rate_out = rate, 2 * rate if doubles else rate
        ends = [part for part, there in ((decoder.conv_in, self.first), (decoder.conv_out, self.last)) if there]
        convolutions = [m for part in (*self.modules, *ends) for m in part.modules() if is_a(m, "WanCausalConv3d")]
        look_back = sum(m.kernel_size[0] - 1 for m in convolutions)  # frames that come in
        # Begun in the middle, a stage is right once it has seen that far, and where it doubles the frames it takes
        # its first latent for the beginning of the video, whose frame is not doubled nor remembered.
        warm = math.ceil(look_back / rate)
        self.warm_up = max(warm, 1 + math.ceil(CACHED_FRAMES / rate)) if doubles else max(warm, 1)
        self.start = 0

    def __call__(self, x: Tensor, first: bool) -> Tensor:
        if self.conv_in is not None:
            x = self.conv_in(x)
        for module, caches in zip(self.modules, self.caches, strict=True):
            more = {"first_chunk": first} if module is self.block else {}
            x = module(x, feat_cache=caches, feat_idx=[0], **more)
        if self.conv_out is not None:
            x = self.conv_out(self.decoder.nonlinearity(self.decoder.norm_out(x)))
        return x


def _all_stages(decoder: nn.Module) -> list[_Stage]:
    stages: list[_Stage] = []
    rate = 1
    blocks: Any = decoder.up_blocks
    for number in range(len(blocks)):
        stages.append(_Stage(decoder, number, rate))
        rate = stages[-1].rate_out
    return stages


def lookback(vae: AutoencoderKLWan) -> int:
    """How many latents back the decoder sees: begun so many before a latent, it makes the frames of this one right.

    So many does `talkingdit.autoencoders.streaming.StreamingDecoder.resume` need: 38 of Wan 2.1.
    """
    # Every stage needs its own warm-up, and the one before must be right by then.
    return sum(stage.warm_up for stage in _all_stages(vae.decoder))


def _stages(decoder: nn.Module, wanted: int) -> list[_Stage]:
    """The stages, each with the latent at which it must begin for the frames of latent `wanted` to be right."""
    stages = _all_stages(decoder)
    for stage in reversed(stages):
        if getattr(stage.block, "avg_shortcut", None) is not None:
            # The blocks of the Wan 2.2 autoencoder have a way around that cannot begin in the middle.
            wanted = 0
        stage.start = wanted = max(0, wanted - stage.warm_up)
    return stages


@torch.no_grad()
def decode_after(vae: AutoencoderKLWan, past: Tensor, latents: Tensor) -> Tensor:
    """Frames of latents that follow others: the end of what decoding `past` and `latents` together gives.

    With `vae.enable_tiling()` all is decoded, in tiles, and the beginning thrown away.

    Args:
        vae: the autoencoder; it is only read.
        past: [B, z_dim, n, H, W] normalised, n >= 1; its first latent is one frame.
        latents: [B, z_dim, T, H, W] normalised.

    Returns:
        [B, 3, 4 T, 8 H, 8 W] in -1..1, float32.
    """
    wanted = past.shape[2]
    together = torch.cat([past.float(), latents.float()], dim=2)
    scaled = denormalise(vae, together).to(vae.dtype)
    if vae.use_tiling:
        tiled: Any = vae.decode(scaled, return_dict=False)[0]
        return tiled[:, :, -FRAMES_PER_LATENT * latents.shape[2] :].float().clamp(-1.0, 1.0)
    x = vae.post_quant_conv(scaled)
    stages = _stages(vae.decoder, wanted)
    decoded = []
    for number in range(x.shape[2]):
        frame = x[:, :, number : number + 1]
        for stage in stages:
            if number < stage.start:
                break
            frame = stage(frame, first=number == stage.start)
            if number == stage.start > 0:
                break  # it knows too little of the past; this latent only fills its caches
        else:
            if number >= wanted:
                decoded.append(frame)
    video = torch.cat(decoded, dim=2)
    if vae.config["patch_size"] is not None:
        video = unpatchify(video, vae.config["patch_size"])
    return video.float().clamp(-1.0, 1.0)
