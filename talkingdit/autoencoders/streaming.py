# SPDX-License-Identifier: Apache-2.0
"""Streaming use of the causal Wan autoencoder: one latent in, its frames out, and nothing kept on the model.

diffusers' `AutoencoderKLWan.decode` takes a whole video and drops its feature caches between calls. Here the caches
belong to the caller, so that a video of any length decodes clip by clip without seams in constant memory, and one
model can serve several streams.

Latents are normalised: (mode of the posterior - latents_mean) / latents_std, per channel, as the model was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT, patchify, unpatchify

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


def feature_caches(module: torch.nn.Module) -> list[Any]:
    """Empty caches for a part of the autoencoder, one for every causal convolution in it."""
    return [None] * sum(is_a(m, "WanCausalConv3d") for m in module.modules())


def is_a(module: torch.nn.Module, name: str) -> bool:
    """Is this a layer of the class of that name, diffusers' or that of `wan_network`? Neither is imported."""
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent channels, [1, C, 1, 1, 1]."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1, 1)
        for values in (vae.config["latents_mean"], vae.config["latents_std"])
    )
    return mean, std


def denormalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Latents as the decoder takes them, float32."""
    mean, std = _statistics(vae, latents)
    return latents.float() * std + mean


@torch.no_grad()
def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Normalised latents of a video; in tiles where `vae.enable_tiling()` was called and the frames are large.

    Args:
        vae: the autoencoder.
        video: [B, 3, 1 + 4 n, H, W] in -1..1. Latent 0 is frame 0, latent k is frames 4 k - 3 .. 4 k.

    Returns:
        [B, z_dim, 1 + n, H / 8, W / 8], float32.

    Raises:
        ValueError: the number of frames is not 1 + 4 n.
    """
    if video.dim() != 5 or video.shape[2] % FRAMES_PER_LATENT != 1:
        raise ValueError(f"encode: video must have shape [B, 3, 1 + 4 n, H, W], got {list(video.shape)}")
    mode = _encode_tiled(vae, video) if vae.use_tiling else _encode_streaming(vae, video)
    mean, std = _statistics(vae, mode)
    return (mode - mean) / std


def _encode_streaming(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    x = video.to(vae.dtype)
    if vae.config["patch_size"] is not None:
        x = patchify(x, vae.config["patch_size"])
    caches = feature_caches(vae.encoder)
    chunks = [x[:, :, :1], *x[:, :, 1:].split(FRAMES_PER_LATENT, dim=2)]
    hidden = torch.cat([vae.encoder(chunk, feat_cache=caches, feat_idx=[0]) for chunk in chunks if chunk.shape[2]], 2)
    return vae.quant_conv(hidden).chunk(2, dim=1)[0].float()


def _encode_tiled(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    posterior: Any = vae.encode(video.to(vae.dtype), return_dict=False)[0]
    return posterior.mode().float()


class StreamingDecoder:
    """Decodes a stream of latents in order; its frames equal those of decoding all latents at once.

    Args:
        vae: the autoencoder; it is only read.

    The first latent of a video is one frame, each later one is four.
    """

    def __init__(self, vae: AutoencoderKLWan):
        self._vae = vae
        self._caches = feature_caches(vae.decoder)
        self._begun = False

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """The next frames.

        Args:
            latents: [B, z_dim, n, H, W] normalised.

        Returns:
            [B, 3, 4 n (fewer by 3 at the beginning of the video), 8 H, 8 W] in -1..1, float32.
        """
        frames = torch.cat(self._decode(latents), dim=2)
        if self._vae.config["patch_size"] is not None:
            frames = unpatchify(frames, self._vae.config["patch_size"])
        return frames.float().clamp(-1.0, 1.0)

    @torch.no_grad()
    def resume(self, past: Tensor) -> None:
        """Go on behind latents that were decoded before, by another decoder: what follows is the same to the last bit.

        Args:
            past: [B, z_dim, n, H, W] normalised, the last latents before the next one: all of them, or at least
                `talkingdit.autoencoders.tail.lookback(vae)`. None at all (n = 0) is the beginning of a video.
        """
        self._caches = feature_caches(self._vae.decoder)
        self._begun = False
        if past.shape[2]:
            for latent in past.split(1, dim=2):
                self._decode(latent)  # one at a time: nothing of what it makes is kept

    def _decode(self, latents: Tensor) -> list[Tensor]:
        """What the decoder makes of every latent, behind those it has seen."""
        vae = self._vae
        made = []
        # One at a time in every layer, so that no bit depends on how many are given at once.
        for latent in denormalise(vae, latents).to(vae.dtype).split(1, dim=2):
            x = vae.post_quant_conv(latent)
            made.append(vae.decoder(x, feat_cache=self._caches, feat_idx=[0], first_chunk=not self._begun))
            self._begun = True
        return made


def to_video(frames: NDArray[np.uint8]) -> Tensor:
    """Frames [F, H, W, 3] uint8 to a video [1, 3, F, H, W] float32 in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0


def to_frames(video: Tensor) -> NDArray[np.uint8]:
    """Video [1, 3, F, H, W] in -1..1, or of frames that are uint8 already, to frames [F, H, W, 3] uint8."""
    pixels = video[0]
    if pixels.dtype != torch.uint8:
        pixels = ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
