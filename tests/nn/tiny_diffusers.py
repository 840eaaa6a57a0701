# SPDX-License-Identifier: Apache-2.0
"""Tiny transformers of diffusers with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COMMON = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
FRAMES, HEIGHT, WIDTH = 4, 6, 8
MODELS = ("wan", "wan-i2v", "wan-no-cross-norm", "wan-ti2v", "vace", "animate", "skyreels", "skyreels-df")


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter random: as made, gates and biases are too small for a mistake to be seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * value)
            else:
                parameter.copy_(value * (0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5))
    return model.eval()


def make(name: str, **changes: Any) -> nn.Module:
    import diffusers

    config: dict[str, Any] = {**COMMON, **changes}
    if name == "vace":
        config |= {
            "in_channels": 4,
            "out_channels": 4,
            "vace_layers": [0, 2][: config["num_layers"]],
            "vace_in_channels": 8,
        }
        return randomise(diffusers.WanVACETransformer3DModel(**config))
    if name == "animate":
        config |= {"in_channels": 12, "latent_channels": 4, "out_channels": 4, "image_dim": 16, "added_kv_proj_dim": 24}
        config |= {"inject_face_latents_blocks": 2, "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4}
        config |= {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_dim": 8}
        config |= {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "num_layers": 2}
        return randomise(diffusers.WanAnimateTransformer3DModel(**config))
    config |= {"in_channels": 4, "out_channels": 4}
    if name.startswith("skyreels"):
        causal = {"num_frame_per_block": 2} if name == "skyreels-df" else {}
        return randomise(diffusers.SkyReelsV2Transformer3DModel(**config, **causal))
    if name == "wan-i2v":
        config |= {"image_dim": 16, "added_kv_proj_dim": 24}
    if name == "wan-no-cross-norm":
        config |= {"cross_attn_norm": False}
    return randomise(diffusers.WanTransformer3DModel(**config))


def inputs(name: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    text = 512 if name in ("wan-i2v", "animate") else 7
    given: dict[str, Any] = {
        "hidden_states": randn(batch, 4, FRAMES, HEIGHT, WIDTH),
        "timestep": torch.tensor([900.0, 30.0])[:batch],
        "encoder_hidden_states": randn(batch, text, 16),
        "return_dict": False,
    }
    if name in ("wan-i2v", "animate"):
        given["encoder_hidden_states_image"] = randn(batch, 5, 16)
    if name == "wan-ti2v":
        tokens = FRAMES * HEIGHT * WIDTH // 4
        given["timestep"] = torch.linspace(0, 1000, batch * tokens).view(batch, tokens)
    if name == "vace":
        given["control_hidden_states"] = randn(batch, 8, FRAMES, HEIGHT, WIDTH)
    if name == "animate":
        given["hidden_states"] = randn(batch, 12, FRAMES, HEIGHT, WIDTH)
        given["pose_hidden_states"] = randn(batch, 4, FRAMES - 1, HEIGHT, WIDTH)
        given["face_pixel_values"] = randn(batch, 3, 4 * (FRAMES - 2) + 1, 16, 16)
    if name == "skyreels-df":
        given["timestep"] = torch.linspace(0, 1000, batch * FRAMES).view(batch, FRAMES)
        given["enable_diffusion_forcing"] = True
    return given
