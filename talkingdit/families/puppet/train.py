# SPDX-License-Identifier: Apache-2.0
"""How drawn characters are trained: as Wan-S2V, with a prompt encoder that trains along, on videos drawn for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from talkingdit.errors import UserError
from talkingdit.families.training import TrainRun, Validator
from talkingdit.families.wan_s2v import train as wan_s2v
from talkingdit.families.wan_s2v.train import (
    EXTRAS,
    MAX_GROUPS,
    attention_tokens,
    count_tokens,
    lacks_layers,
    open_weights,
    velocities,
)

if TYPE_CHECKING:
    from talkingdit.data import Source
    from talkingdit.families.puppet.text import PromptEncoder
    from talkingdit.families.wan_s2v.model import WanS2VModel
    from talkingdit.nn.context_parallel import ContextParallel

__all__ = [
    "EXTRAS",
    "MAX_GROUPS",
    "attention_tokens",
    "build_networks",
    "count_tokens",
    "lacks_layers",
    "open_source",
    "open_validator",
    "open_weights",
    "save",
    "velocities",
]


def build_networks(arguments: Mapping[str, Any], text_encoder: str) -> tuple[WanS2VModel, PromptEncoder | None]:
    """A transformer and, for "prompt", a prompt encoder of its width; both with random weights."""
    from talkingdit.families.puppet.text import PromptEncoder
    from talkingdit.families.wan_s2v.model import WanS2VModel

    transformer = WanS2VModel(**arguments)
    trained = text_encoder == "prompt"
    return transformer, PromptEncoder(arguments["text_dim"], arguments["text_len"]) if trained else None


def check_export(arguments: Mapping[str, Any], text_encoder: str, run: TrainRun) -> None:
    """Whether `save` will find what it needs: settings that generation takes, and the autoencoder.

    Raises:
        UserError: it will not.
    """
    from talkingdit.families.puppet.checkpoint import PuppetSettings

    if text_encoder != "prompt":
        wan_s2v.check_export(arguments, text_encoder, run)
        return
    try:
        PuppetSettings.of_run(run)
    except ValueError as error:
        said = str(error).removeprefix("pipeline.json: ")
        raise UserError(f"training: generation would not take the model that this run exports: {said}.") from error
    key = "shipped_vae" if run.data["shipped_vae"] else "vae"
    if not (Path(run.data[key]) / "config.json").is_file():
        raise UserError(f"data.{key}: must be the folder of the autoencoder that is exported too, got {run.data[key]}.")


def save(folder: Path, transformer: WanS2VModel, text_encoder: PromptEncoder | None, run: TrainRun) -> None:
    """A whole checkpoint; without a prompt encoder the transformer alone, as Wan-S2V writes it."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from talkingdit.families.puppet.checkpoint import PuppetSettings, save_checkpoint

    if text_encoder is None:
        wan_s2v.save(folder, transformer, None, run)
        return
    vae = AutoencoderKLWan.from_pretrained(run.data["shipped_vae"] or run.data["vae"]).to(text_encoder.position.dtype)
    save_checkpoint(folder, transformer, vae, text_encoder, PuppetSettings.of_run(run))
    for described in folder.glob("*/config.json"):
        settings = json.loads(described.read_text())
        settings.pop("_name_or_path", None)  # where it lay on the machine that trained it is nobody's business
        described.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def open_source(kind: str, name: str, run: TrainRun) -> Source:
    """Clips of drawn videos ("puppets"), which rank 0 draws if nobody has done so before."""
    from talkingdit.distributed.team import from_rank_0
    from talkingdit.families.puppet.drawn import DrawnVideos, Puppets, precompute

    videos = DrawnVideos.of(run)
    from_rank_0(lambda: precompute(videos, run.seed))
    return Puppets(videos.cache, run.clip_latents, run.audio_context, name)


def open_validator(run: TrainRun, device: torch.device, context: ContextParallel | None) -> Validator | None:
    """Held-out characters speak with held-out voices."""
    from talkingdit.families.puppet.validate import PuppetValidator

    return PuppetValidator(run)
