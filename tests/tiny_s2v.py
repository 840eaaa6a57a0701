# SPDX-License-Identifier: Apache-2.0
"""A Wan-S2V checkpoint in memory with random weights: a real transformer and autoencoder, stand-ins for the rest."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from talkingdit.encoders.text import TextFeatures
from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint, WanS2VSettings
from talkingdit.models import WanS2VModel, preset

TEXT_DIM, AUDIO_DIM, LAYERS = 24, 12, 3
TRANSFORMER = {
    **{"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "audio_inject_layers": (0, 1), "freq_dim": 32},
    **{"text_dim": TEXT_DIM, "text_len": 8, "audio_dim": AUDIO_DIM, "audio_layers": LAYERS},
}


class Words:
    """Text features that depend on the text alone."""

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        rows = torch.zeros(len(prompts), 6, TEXT_DIM)
        mask = torch.zeros(len(prompts), 6, dtype=torch.bool)
        for row, filled, prompt in zip(rows, mask, prompts, strict=True):
            length = 1 + len(prompt) % 6
            generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            row[:length] = torch.randn(length, TEXT_DIM, generator=generator)
            filled[:length] = True
        return TextFeatures(rows, mask)

    def unknown_words(self, prompt: str) -> list[str]:
        return []

    def left_out_words(self, prompt: str) -> list[str]:
        return []


class Voice:
    """Speech features: loudness of each picture's sound, spread by fixed weights; zero behind the end."""

    def features(self, waveform: np.ndarray | Tensor, frames: int) -> Tensor:
        samples = torch.as_tensor(waveform).float()[: frames * 1000]
        level = torch.nn.functional.pad(samples, (0, frames * 1000 - len(samples))).view(frames, 1000).pow(2).mean(1)
        weights = torch.randn(LAYERS, AUDIO_DIM, 1, generator=torch.Generator().manual_seed(1))
        return weights * level.sqrt() * 4


def make_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def make_s2v(seed: int = 0, settings: dict[str, Any] | None = None, **changes: Any) -> WanS2VCheckpoint:
    """The checkpoint; no weight is zero that would hide a condition, the decoder makes pictures of full contrast."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanS2VModel(**preset("wan_s2v_14b", **TRANSFORMER | changes)).eval()
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
        vae = make_vae()
        torch.nn.init.normal_(vae.decoder.conv_out.weight, std=0.2)
    chosen = {"steps": 2, "max_area": 64 * 64} | (settings or {})
    return WanS2VCheckpoint(model, vae, Words(), Voice(), WanS2VSettings(**chosen), Path("tiny"))  # type: ignore[arg-type]
