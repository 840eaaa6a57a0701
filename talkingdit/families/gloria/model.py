# SPDX-License-Identifier: Apache-2.0
"""The transformer of Gloria (arXiv:2603.29931): Wan I2V with content anchors and an audio branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - where diffusers finds a class, it looks for this
from torch import Tensor, nn

from talkingdit.families.gloria.anchors import KINDS, OFFSETS, STEP, anchor_time
from talkingdit.families.gloria.audio import WINDOW, AudioProjection, WindowAttention
from talkingdit.families.wan_i2v.conditions import WanI2VInputs
from talkingdit.families.wan_i2v.model import WanI2VModel
from talkingdit.nn.shapes import check_shape


class GloriaModel(WanI2VModel):
    """The transformer of Gloria. Parameters that Wan I2V has keep its names.

    Audio is features [B, audio_layers, audio_dim, 4 T] of a speech encoder, four per latent frame. Anchors are extra
    tokens at `anchor_time`.

    Args:
        dim, ffn_dim, num_heads, num_layers, in_dim, out_dim, patch_size, freq_dim, text_dim, text_len, image_dim,
            zero_timestep, residual_dtype, attention_backend, eps: see `WanI2VModel`.
        audio_inject_layers: blocks with audio attention, ascending.
        audio_dim, audio_layers: width and number of layers of the speech features.
        audio_width: of audio tokens.
        anchor_offsets: base of every type of anchor in time, in latent frames.
        anchor_step: from one kind of a type to the next.

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
        audio_inject_layers: Sequence[int] = tuple(range(0, 40, 2)),
        audio_dim: int = 1024,
        audio_layers: int = 25,
        audio_width: int = 768,
        anchor_offsets: Mapping[str, float] | None = None,
        anchor_step: float = STEP,
        zero_timestep: bool = True,
        residual_dtype: str = "float32",
        attention_backend: str = "auto",
        eps: float = 1e-6,
    ):
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
            audio_inject_layers=audio_inject_layers,
            zero_timestep=zero_timestep,
            residual_dtype=residual_dtype,
            attention_backend=attention_backend,
            eps=eps,
        )
        given = OFFSETS if anchor_offsets is None else anchor_offsets
        if set(given) != set(KINDS):
            raise ValueError(f"GloriaModel: anchor_offsets must have {', '.join(KINDS)}, got {', '.join(given)}")
        self.register_to_config(anchor_offsets=dict(given))
        self.audio_proj = AudioProjection(audio_dim, audio_layers, audio_width)
        self._silence_audio()

    def audio_attention(self) -> nn.Module:
        c = self.config
        return WindowAttention(c.dim, c.num_heads, c.audio_width, c.eps)

    def _silence_audio(self) -> None:
        """Audio begins without effect: its values are zero (section 4.4, stage I)."""
        for name, parameter in self.named_parameters():
            if name.endswith(("audio_attn.v.weight", "audio_attn.v.bias", "audio_attn.o.bias")):
                nn.init.zeros_(parameter)

    def anchor_time(self, type: str, kind: str) -> float:
        """Place in time of an anchor's tokens; ValueError for one that does not exist."""
        return anchor_time(self.config.anchor_offsets, self.config.anchor_step, type, kind)

    def encode_audio(self, clips: Sequence[WanI2VInputs], frames: Sequence[int]) -> list[Tensor] | None:
        """Audio tokens [B, F, 4, audio_width] of every clip. No audio is silence: features of zeros."""
        c, dtype = self.config, self.patch_embedding.weight.dtype
        features = []
        for i, (clip, count) in enumerate(zip(clips, frames, strict=True)):
            shape = (len(clip.text), c.audio_layers, c.audio_dim, WINDOW * count)
            if clip.audio is None:
                features.append(torch.zeros(shape, dtype=dtype, device=clip.text.device))
                continue
            try:
                check_shape(type(self).__name__, "audio", clip.audio, shape)
            except ValueError as error:
                raise ValueError(f"{error}{f' (packed clip {i})' if len(clips) > 1 else ''}") from None
            features.append(clip.audio)
        longest = max(frames)
        together = torch.cat([F.pad(one, (0, WINDOW * longest - one.shape[-1])) for one in features])
        tokens = self.audio_proj(together).split([len(clip.text) for clip in clips])
        return [one[:, :count] for one, count in zip(tokens, frames, strict=True)]
