# SPDX-License-Identifier: Apache-2.0
"""The transformer of SkyReels-Audio (arXiv:2506.00830, section 2.2): Wan image-to-video that hears.

Animation of a picture and editing of a video are one model. Behind the channels of the noisy latents stand a mask,
one where the video is given, and the latents of what is given, with grey in place of the rest (see `known.py`).

Whisper's states are projected to audio tokens, one sequence per clip. Attention to them is the last of the decoupled
cross-attention of every block: that to text, to the picture and to audio share a norm, and what each finds is added.
Queries and keys have rotary time, see `talkingdit.ops.audio_rope`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - where diffusers finds a class, it looks for this
from torch import Tensor, nn

from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.families.skyreels_audio.blocks import AudioRopeAttention, heard
from talkingdit.families.wan_i2v.conditions import WanI2VInputs
from talkingdit.families.wan_i2v.model import WanI2VModel
from talkingdit.nn.layers import LayerNorm
from talkingdit.nn.shapes import check_shape


class SkyReelsAudioModel(WanI2VModel):
    """The SkyReels-Audio transformer. Parameters of the base keep the names of the released Wan checkpoints.

    Args:
        audio_dim: width of speech features.
        audio_layers: audio tokens of a video frame, as many as features have layers.
        audio_window: latent frames on each side whose audio a frame hears; None is the whole clip, as in the paper.
        audio_rope: rotary time in audio attention.
        audio_theta: base of its frequencies.
        audio_inject_layers: the blocks that hear; None is all.
        dim, ffn_dim, num_heads, num_layers, in_dim, out_dim, patch_size, freq_dim, text_dim, text_len, image_dim,
        zero_timestep, residual_dtype, attention_backend, eps: as of `WanI2VModel`.

    Raises:
        ValueError: for settings that contradict each other.
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 5120,
        ffn_dim: int = 13824,
        num_heads: int = 40,
        num_layers: int = 40,
        in_dim: int = 36,
        out_dim: int = 16,
        patch_size: Sequence[int] = (1, 2, 2),
        freq_dim: int = 256,
        text_dim: int = 4096,
        text_len: int = 512,
        image_dim: int = 1280,
        audio_inject_layers: Sequence[int] | None = None,
        audio_dim: int = 1280,
        audio_layers: int = 2,
        audio_window: int | None = None,
        audio_rope: bool = True,
        audio_theta: float = 10000.0,
        zero_timestep: bool = True,
        residual_dtype: str = "float32",
        attention_backend: str = "auto",
        eps: float = 1e-6,
    ):
        if in_dim - 2 * out_dim < 1:
            raise ValueError(
                f"SkyReelsAudioModel: in_dim must have channels for noise, mask and what is given, over 2 * out_dim = "
                f"{2 * out_dim}, got {in_dim}"
            )
        if min(audio_dim, audio_layers) < 1 or (audio_window is not None and audio_window < 0):
            raise ValueError(
                "SkyReelsAudioModel: audio_dim and audio_layers must be at least 1 and audio_window at least 0, got "
                f"{audio_dim}, {audio_layers} and {audio_window}"
            )
        super().__init__(
            dim=dim,
            ffn_dim=ffn_dim,
            num_heads=num_heads,
            num_layers=num_layers,
            in_dim=in_dim,
            out_dim=out_dim,
            patch_size=patch_size,
            freq_dim=freq_dim,
            text_dim=text_dim,
            text_len=text_len,
            image_dim=image_dim,
            audio_inject_layers=tuple(range(num_layers)) if audio_inject_layers is None else audio_inject_layers,
            zero_timestep=zero_timestep,
            residual_dtype=residual_dtype,
            attention_backend=attention_backend,
            eps=eps,
        )
        self.audio_proj = nn.Sequential(
            LayerNorm(audio_dim, eps=1e-5),
            nn.Linear(audio_dim, dim),
            nn.GELU(),
            nn.Linear(dim, dim),
            LayerNorm(dim, eps=1e-5),
        )
        self.silence_audio()

    def audio_attention(self) -> nn.Module:
        c: Any = self.config
        per_frame = FRAMES_PER_LATENT * c.audio_layers
        theta = float(c.audio_theta) if c.audio_rope else 0.0
        return AudioRopeAttention(c.dim, c.num_heads, c.eps, per_frame, c.audio_window, theta)

    def silence_audio(self) -> None:
        """Let audio attention add nothing, as at the beginning of training."""
        for block in self.blocks:
            if isinstance(block.audio_attn, AudioRopeAttention):
                block.audio_attn.begin_silent()

    def encode_audio(self, clips: Sequence[WanI2VInputs], frames: Sequence[int]) -> list[Tensor] | None:
        """Audio tokens [B, F, K, dim] that the latent frames of each clip hear.

        The features of a clip are [B, audio_layers, audio_dim, 4 F], a column per video frame and four columns per
        latent frame; the first latent, which is one frame, has the column of this frame four times. None is silence,
        which is zeros.

        Raises:
            ValueError: features of another shape.
        """
        c: Any = self.config
        weight: Any = self.audio_proj[1].weight
        found = []
        hears = heard(tuple(frames), FRAMES_PER_LATENT * c.audio_layers, c.audio_window)
        for clip, count, places in zip(clips, frames, hears, strict=True):
            shape = (len(clip.text), c.audio_layers, c.audio_dim, FRAMES_PER_LATENT * count)
            check_shape(type(self).__name__, "audio", clip.audio, shape)
            audio = torch.zeros(shape, dtype=weight.dtype) if clip.audio is None else clip.audio
            audio = audio.to(clip.text.device, weight.dtype)
            sequence = self.audio_proj(audio.permute(0, 3, 1, 2).flatten(1, 2))
            found.append(sequence[:, places.tokens.to(sequence.device)])
        return found
