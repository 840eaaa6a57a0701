# SPDX-License-Identifier: Apache-2.0
"""What a configuration asks for, made: networks with their weights, and what generation is told of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from talkingdit.errors import UserError
from talkingdit.families import preset
from talkingdit.families.puppet.checkpoint import PuppetSettings
from talkingdit.families.puppet.text import PromptEncoder
from talkingdit.families.wan_s2v.initialise import is_video_model
from talkingdit.families.wan_s2v.load import load
from talkingdit.families.wan_s2v.model import WanS2VModel
from talkingdit.families.wan_s2v.save import save_official
from training.config import Config
from training.lora import add_adapters
from training.networks import Networks
from training.parallel import ProcessMesh, load_weights, local_part, shard


def pipeline_settings(config: Config) -> PuppetSettings:
    """What a model of drawn characters trained with this configuration tells those who generate with it."""
    return PuppetSettings(
        fps=config.data.fps,
        size=config.data.size,
        clip_latents=config.model.clip_latents,
        audio_history=config.model.audio_context,
        shift=config.objective.shift,
        steps=config.sample.steps,
        text_guidance=config.sample.text_guidance,
        audio_guidance=config.sample.audio_guidance,
    )


def settings_of(config: Config) -> dict[str, Any]:
    """Arguments of the transformer."""
    return {**preset(config.model.preset), **config.model.settings}


def new_networks(config: Config, device: torch.device | str = "cpu") -> Networks:
    """Networks with random weights of the run's seed, adapters included; on "meta" without any weights."""
    settings = settings_of(config)
    torch.manual_seed(config.run.seed)
    with torch.device(device):
        transformer = WanS2VModel(**settings)
        prompts = config.model.text_encoder == "prompt"
        text_encoder = PromptEncoder(settings["text_dim"], settings["text_len"]) if prompts else None
        if config.lora.rank > 0:
            add_adapters(transformer, config.lora)
    return Networks(transformer, text_encoder)


def sharded_networks(config: Config, layout: ProcessMesh, resumes: bool) -> Networks:
    """Networks as training needs them: sharded, with the weights that the run begins with.

    With `model.start` they are never whole anywhere, every rank reads its own rows. Without it the weights are random
    and made whole on every rank first, which is for models that fit.

    Args:
        resumes: a checkpoint will fill what trains. `model.start` is read all the same where adapters train on it,
            because checkpoints of such a run hold only what trains.
    """
    start = config.model.start
    networks = new_networks(config, "cpu" if start is None else "meta")
    shard(networks, layout, config.parallel)
    if start is not None and not (resumes and config.lora.rank == 0):
        load_weights(networks, _whole(start, config, layout))
        _reset_adapters(networks, config)
    return networks


def _whole(start: Path, config: Config, layout: ProcessMesh) -> Path:
    """A folder that has every weight of the transformer: `start`, or what is made of the video model there.

    A Wan video model (T2V, I2V) lacks audio layers, history packer and token kinds. Rank 0 adds those, new, once and
    writes the result beside the run; that takes host memory for the model in bfloat16.
    """
    if not is_video_model(start):
        return start
    folder = config.run.out / "start"
    if layout.rank == 0 and not folder.exists():
        changes = config.model.settings
        model = load(config.model.preset, dtype=torch.bfloat16, config=changes, init_from=start, seed=config.run.seed)
        temporary = folder.with_name("start.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        save_official(temporary, model)
        temporary.rename(folder)
    dist.barrier()
    if not folder.exists():
        raise UserError(f"training: {folder} must be on storage that all nodes see, got none on this one.")
    return folder


@torch.no_grad()
def _reset_adapters(networks: Networks, config: Config) -> None:
    """Adapters of networks that began without memory: as PEFT begins them, the same on every layout."""
    generator = torch.Generator().manual_seed(config.run.seed)
    named: Any = networks.named_parameters()  # sharded, which its type does not say
    for name, parameter in named:
        if ".lora_A." in name:
            whole = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(whole, a=5**0.5, generator=generator)
            parameter.to_local().copy_(local_part(whole, parameter))
        elif ".lora_B." in name:
            parameter.to_local().zero_()
