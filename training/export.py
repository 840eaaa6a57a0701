# SPDX-License-Identifier: Apache-2.0
"""Writes a trained model as the folder that `talkingdit generate --checkpoint` loads."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from talkingdit.models.text import PromptEncoder
from talkingdit.models.wan import WanS2VModel
from training.config import Config
from training.validate import pipeline_settings


def export(
    transformer: WanS2VModel, text_encoder: PromptEncoder, vae: AutoencoderKLWan, config: Config, folder: Path
) -> None:
    """Save transformer, prompt encoder and autoencoder in bfloat16 with `pipeline.json`, whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    networks: dict[str, Any] = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    for name, network in networks.items():
        copy.deepcopy(network).to(torch.bfloat16).save_pretrained(temporary / name)
        described = temporary / name / "config.json"
        settings = json.loads(described.read_text())
        settings.pop("_name_or_path", None)  # where it lay on the machine that trained it is nobody's business
        described.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    pipeline_settings(config).save(temporary / "pipeline.json")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
