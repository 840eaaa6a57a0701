# SPDX-License-Identifier: Apache-2.0
"""A whole checkpoint with random weights, small enough to generate a second of video in a blink."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from talkingdit.families.puppet.checkpoint import PuppetSettings, save_checkpoint
from talkingdit.families.puppet.text import PromptEncoder
from talkingdit.models import WanS2VModel, preset


def make_vae(z_dim: int = 16) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        dim_mult=[1, 2, 2],
        z_dim=z_dim,
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        latents_mean=[0.1 * (i % 3) for i in range(z_dim)],
        latents_std=[0.5 + 0.1 * (i % 4) for i in range(z_dim)],
    ).eval()


def make_transformer(**changes: Any) -> WanS2VModel:
    model = WanS2VModel(
        **preset(
            "puppet_tiny",
            **{"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "audio_inject_layers": (0, 1)} | changes,
        )
    )
    # Random heads and norms: a fresh model answers zero to everything, which would test nothing.
    for parameter in (model.head.head.weight, *(m.linear.weight for m in model.audio_injector.injector_adain_layers)):
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_checkpoint(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Write a random checkpoint for pictures of 32 x 32 pixels and clips of 8 pictures; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = make_transformer()
        chosen = {"size": 32, "clip_latents": 2, "steps": 2, "text_guidance": 1.5, "audio_guidance": 2.0} | settings
        text = PromptEncoder(text_dim=transformer.config.text_dim, text_len=transformer.config.text_len)
        save_checkpoint(folder, transformer, make_vae(), text, PuppetSettings(**chosen))
    return folder
