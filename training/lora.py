# SPDX-License-Identifier: Apache-2.0
"""LoRA training: PEFT adapters on a transformer before it is sharded, and what of them is saved under which names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.sections import LoraConfig
from training.stages import plain_name

ADAPTER = "default"  # PEFT's name for an adapter; files leave it out
PREFIX = "diffusion_model."  # in front of native names in LoRA files, as other programs for Wan models expect it


def add_adapters(transformer: Any, config: LoraConfig, seed: int = 0) -> list[str]:
    """Put adapters on the linear layers that `targets` name, as `*.TARGET` or `TARGET`; returns the layers' names.

    The adapters are float32 (the numbers that are trained are small), begin without effect, and alone require
    gradients afterwards. Call it before `fully_shard`, on any device (on meta nothing is initialised).

    Args:
        transformer: a diffusers model with the PEFT adapter mixin.
        config: rank over 0.
        seed: of the first values, so that every rank has the same.

    Raises:
        ValueError: the rank is not over 0, or a target is the end of no linear layer's name.
    """
    from peft import LoraConfig as PeftConfig

    if config.rank < 1:
        raise ValueError(f"lora.rank must be over 0, got {config.rank}")
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    adapted = []
    for target in config.targets:
        layers = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not layers:
            raise ValueError(f"lora.targets: {target!r} is the end of no linear layer's name; layers: {_kinds(linear)}")
        adapted += [name for name in layers if name not in adapted]
    alpha: Any = config.alpha or config.rank  # PEFT asks for a whole number and takes any
    settings = PeftConfig(r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=adapted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(settings, ADAPTER)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return adapted


def _kinds(names: list[str]) -> str:
    """The different ends of module names, numbers left out."""
    ends = {".".join(part for part in name.split(".") if not part.isdigit()) for name in names}
    return ", ".join(sorted(ends))


def adapter_state_names(transformer: nn.Module) -> dict[str, str]:
    """Name of every adapter tensor in the model's state dict -> its name in a LoRA file.

    The file's names are `diffusion_model.blocks.0.self_attn.q.lora_A.weight`: the native names of the layers, which
    `talkingdit.models.checkpoints.Loras` and the programs that run Wan models read.
    """
    return {
        name: PREFIX + plain_name(name).replace(f".{ADAPTER}.", ".")
        for name in transformer.state_dict()
        if ".lora_" in name
    }


def adapter_tensors(
    transformer: nn.Module, config: LoraConfig, state: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What a LoRA file of the adapters holds: their matrices and, for every layer, alpha.

    Args:
        transformer: the model, sharded or not.
        config: as it was given to `add_adapters`.
        state: whole tensors by the names of the state dict (a gathered one, or averages); None: the model's own.

    Returns:
        Names as in `adapter_state_names`, and `.alpha` of each layer; CPU tensors.
    """
    values = transformer.state_dict() if state is None else state
    tensors: dict[str, Tensor] = {}
    for name, exported in adapter_state_names(transformer).items():
        tensors[exported] = values[name].detach().cpu().contiguous()
        layer = exported.split(".lora_")[0]
        tensors[f"{layer}.alpha"] = torch.tensor(float(config.alpha or config.rank))
    return tensors
