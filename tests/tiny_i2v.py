# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders of Wan I2V and of families on it: every file that loading looks for, tiny, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from official import make_official
from transformers import CLIPVisionConfig, CLIPVisionModel

from talkingdit import models
from talkingdit.checkpoints.saving import save_model

WIDTHS = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 32, "text_dim": 32, "image_dim": 16}


def picture_model(width: int = 16) -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=1, image_size=28,
        patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    return CLIPVisionModel(config).eval()


def make_i2v(
    folder: Path, preset: str = "wan_i2v_tiny", settings: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Write a whole checkpoint in the layout of diffusers; returns the folder.

    Args:
        preset: of the transformer.
        settings: what pipeline.json says.
        changes: of the transformer.
    """
    official = make_official(folder / "official", shards=1)
    for old, new in (
        ("Wan2.1_VAE.pth", "vae"),
        ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"),
        ("google/umt5-xxl", "tokenizer"),
        ("wav2vec2-large-xlsr-53-english", "audio_encoder"),
    ):
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (official / old).rename(folder / new)
    _as_folders(folder)
    for file in sorted(official.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    official.rmdir()
    torch.manual_seed(0)
    model = models.load(preset, config=WIDTHS | changes)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    save_model(model, folder / "transformer")
    if model.config.image_dim:
        picture_model(model.config.image_dim).save_pretrained(folder / "image_encoder")
    chosen = {"steps": 2, "max_area": 64 * 64, "chunk_latents": 4} | (settings or {})
    (folder / "pipeline.json").write_text(json.dumps(chosen))
    return folder


def _as_folders(folder: Path) -> None:
    """The official files of autoencoder and text encoder as diffusers and transformers write them."""
    from talkingdit.autoencoders.wan import load_vae
    from talkingdit.encoders.umt5 import load_umt5

    for name, load in (("vae", load_vae), ("text_encoder", load_umt5)):
        file = (folder / name).rename(folder / f"{name}.pth")
        load(file, torch.float32).save_pretrained(folder / name)
        file.unlink()
