# SPDX-License-Identifier: Apache-2.0
"""What a configuration asks for, made: networks with the weights that a run begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from talkingdit.atomic import whole_folder
from talkingdit.errors import UserError
from training.config import Config
from training.family import family_of, settings_of, train_run
from training.float8 import use_float8
from training.frozen import check_frozen, narrow
from training.lora import add_adapters
from training.networks import Networks
from training.one_run import written
from training.parallel import ProcessMesh, load_weights, local_part, shard
from training.stages import trained_names


def new_networks(config: Config, device: torch.device | str = "cpu") -> Networks:
    """Networks with random weights of the run's seed, adapters included; on "meta" without any weights."""
    family = family_of(config)
    torch.manual_seed(config.run.seed)
    with torch.device(device):
        transformer, text_encoder = family.train.build_networks(settings_of(config), config.model.text_encoder)
        if config.lora.rank > 0:
            add_adapters(transformer, config.lora)
    return Networks(family, transformer, text_encoder)


def sharded_networks(config: Config, mesh: ProcessMesh, resumes: bool) -> Networks:
    """Networks as training needs them: sharded, with the weights that the run begins with.

    With `model.start` they are never whole anywhere, every rank reads its own rows. Without it the weights are random
    and made whole on every rank first, which is for models that fit.

    Args:
        resumes: a checkpoint will fill what trains. `model.start` is read all the same where adapters train on it,
            because checkpoints of such a run hold only what trains.
    """
    start = config.model.start
    networks = new_networks(config, "cpu" if start is None else "meta")
    trained, units = trained_names(config, networks), networks.family.units
    check_frozen(config.model, config.lora.rank, trained)
    narrow(networks.transformer, units, config.model, trained, mesh.device, config.parallel.offload)
    use_float8(networks, config.parallel, mesh.device)
    shard(networks, mesh, config.parallel, narrow=config.model.frozen != "float32")
    if start is not None and not (resumes and config.lora.rank == 0):
        load_weights(networks, _whole_start(start, config))
        _reset_adapters(networks, config)
    return networks


def _whole_start(start: Path, config: Config) -> Path:
    """A folder that has every weight of the transformer: `start`, or what is made of a model that lacks layers.

    Rank 0 adds those, new, once and writes the result beside the run; that takes host memory for the model in bfloat16.
    """
    family = family_of(config)
    if not family.train.lacks_layers(start):
        return start
    folder = config.run.out / "start"

    def make() -> None:
        if folder.exists():
            return
        settings, seed = config.model.settings, config.run.seed
        model = family.load.load(config.model.preset, dtype=torch.bfloat16, seed=seed, config=settings, init_from=start)
        with whole_folder(folder) as temporary:
            family.train.save(temporary, model, None, train_run(config))

    written(folder, make, "training")
    if not folder.exists():
        raise UserError(f"training: {folder} must be on storage that all nodes see, got none on this one.")
    return folder


@torch.no_grad()
def _reset_adapters(networks: Networks, config: Config) -> None:
    """Adapters of networks that began without memory: as PEFT begins them, the same on every mesh."""
    generator = torch.Generator().manual_seed(config.run.seed)
    named: Any = networks.named_parameters()  # sharded, which its type does not say
    for name, parameter in named:
        if ".lora_A." in name:
            whole = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(whole, a=5**0.5, generator=generator)
            parameter.to_local().copy_(local_part(whole, parameter))
        elif ".lora_B." in name:
            parameter.to_local().zero_()
