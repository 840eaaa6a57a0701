# SPDX-License-Identifier: Apache-2.0
"""LoRA files in the formats that are passed around for Wan models, read into one form.

    blocks.0.self_attn.q.lora_A.weight, .lora_B.weight      PEFT and diffusers, also with diffusers' module names
    blocks.0.self_attn.q.lora_down.weight, .lora_up.weight, .alpha
    lora_unet_blocks_0_self_attn_q.lora_down.weight, ...    kohya and musubi
    blocks.0.norm3.diff, .diff_b                            full changes of a weight or bias, as lightx2v writes them

each also behind a prefix such as diffusion_model. or transformer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from talkingdit.checkpoints.names import to_diffusers, to_native
from talkingdit.checkpoints.weights import Weights, open_weights, read_json, some
from talkingdit.errors import UserError

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_", "model.")
# What a file may say of a module, and what it means here.
KINDS = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "lora_B.bias": "diff_b",
    "diff_m": "diff_m",
}
ENDING = re.compile(r"(.+)\.(" + "|".join(re.escape(kind) for kind in sorted(KINDS, key=len, reverse=True)) + r")$")
PARAMETERS = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
# Layers of I2V models that Wan-S2V does not have.
IMAGE = re.compile(r"img_emb|[._](k|v|norm_k)_img|add_[kv]_proj|norm_added_k|image_embedder")


@dataclass(frozen=True)
class LowRank:
    """A change of one module's weight: scale * up @ down (over the flattened inputs of a convolution)."""

    down: Tensor  # [rank, in, ...]
    up: Tensor  # [out, rank, ...]
    scale: float

    def delta(self, weight: Tensor) -> Tensor:
        """The change of a weight: float32, its shape, on its device."""
        up, down = (part.to(weight.device, torch.float32).flatten(1) for part in (self.up, self.down))
        return (self.scale * (up @ down)).reshape(weight.shape)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file with its parts under the native names of the model's modules and parameters."""

    source: Path
    low_rank: Mapping[str, LowRank]  # by module
    diffs: Mapping[str, Tensor]  # by parameter
    ignored: tuple[str, ...]  # keys for layers of an image branch


def read_lora(source: str | Path, model: nn.Module) -> LoraFile:
    """Read a LoRA file.

    Args:
        source: a .safetensors file, or a PEFT folder (adapter_config.json, adapter_model.safetensors).
        model: tells what the modules are called and which shapes they have. It is only read.

    Raises:
        UserError: not such a file, an unknown kind of adapter, or parts for modules that the model does not have or
            of another shape.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: there is no such LoRA file or folder.")
    weights = open_weights(path)
    scale = _configured_scale(path, weights)
    modules = {name: module for name, module in model.named_modules() if name and not _is_adapter(name)}
    modules = {name.replace(".base_layer", ""): _base(module) for name, module in modules.items()}
    find = _finder(modules)
    parts: dict[str, dict[str, str]] = {}
    ignored, strange, unknown = [], [], []
    for key in weights.entries:
        match = ENDING.match(key)
        if match is None:
            strange.append(key)
        elif (module := find(match[1])) is not None:
            parts.setdefault(module, {})[KINDS[match[2]]] = key
        elif IMAGE.search(key):
            ignored.append(key)
        else:
            unknown.append(key)
    if strange:
        raise UserError(f"{path}: not a LoRA file of a kind that is supported ({some(strange)}).")
    if unknown:
        raise UserError(f"{path}: has parts for layers that the model does not have: {some(unknown)}.")
    return _assemble(path, weights, parts, modules, scale, tuple(ignored))


def _assemble(
    path: Path,
    weights: Weights,
    parts: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, nn.Module],
    scale: Callable[[str, int], float],
    ignored: tuple[str, ...],
) -> LoraFile:
    low_rank: dict[str, LowRank] = {}
    diffs: dict[str, Tensor] = {}
    tensors = weights.read(key for keys in parts.values() for key in keys.values())
    for module, keys in parts.items():
        if ("down" in keys) != ("up" in keys):
            raise UserError(f"{path}: has only one of the two matrices of {module}.")
        if "down" in keys:
            down, up = tensors[keys["down"]], tensors[keys["up"]]
            rank = down.shape[0]
            factor = tensors[keys["alpha"]].item() / rank if "alpha" in keys else scale(module, rank)
            weight = getattr(modules[module], "weight", None)
            wanted = None if weight is None else (weight.shape[0], math.prod(weight.shape[1:]))
            if wanted != (up.shape[0], math.prod(down.shape[1:])) or math.prod(up.shape[1:]) != rank:
                raise UserError(
                    f"{path}: the matrices of {module} are {list(down.shape)} and {list(up.shape)}, "
                    f"which does not fit its weight {None if weight is None else list(weight.shape)}."
                )
            low_rank[module] = LowRank(down, up, factor)
        for kind, parameter in PARAMETERS.items():
            if kind not in keys:
                continue
            value, target = tensors[keys[kind]], getattr(modules[module], parameter, None)
            if not isinstance(target, Tensor) or target.numel() != value.numel():
                got = "there is not" if target is None else f"is {list(target.shape)}"
                raise UserError(f"{path}: changes {module}.{parameter} by {list(value.shape)}, which {got}.")
            diffs[f"{module}.{parameter}"] = value.reshape(target.shape)
    if not low_rank and not diffs:
        raise UserError(f"{path}: holds nothing for this model.")
    return LoraFile(path, low_rank, diffs, ignored)


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _base(module: nn.Module) -> nn.Module:
    """The layer below adapters that it may have already."""
    base = getattr(module, "base_layer", None)
    return base if isinstance(base, nn.Module) else module


def _finder(modules: Mapping[str, nn.Module]) -> Callable[[str], str | None]:
    """A function from the name that a file has for a module to that of the model, None where it has none."""
    spelled: dict[str, str] = {}
    for name in modules:
        for spelling in (name, to_diffusers(name)):
            spelled[spelling] = spelled[spelling.replace(".", "_")] = name

    def find(name: str) -> str | None:
        while True:
            if (found := spelled.get(name) or spelled.get(to_native(name))) is not None:
                return found
            prefix = next((p for p in PREFIXES if name.startswith(p)), None)
            if prefix is None:
                return None
            name = name.removeprefix(prefix)

    return find


def _configured_scale(path: Path, weights: Weights) -> Callable[[str, int], float]:
    """Scale of a module of a rank as a PEFT configuration says it; 1 where there is none."""
    config: dict[str, Any] = {}
    if path.is_dir() and (path / "adapter_config.json").is_file():
        config = read_json(path / "adapter_config.json")
    elif (text := weights.metadata.get("lora_adapter_metadata")) is not None:
        try:
            config = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
        except (json.JSONDecodeError, AttributeError) as error:
            raise UserError(f"{path}: its adapter configuration is not readable ({error}).") from error
    if config.get("use_dora"):
        raise UserError(f"{path}: a DoRA adapter, which is not supported.")
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}

    def scale(module: str, rank: int) -> float:
        names = (module, to_diffusers(module))
        chosen = next((v for k, v in patterns.items() if any(re.fullmatch(rf"(.*\.)?({k})", n) for n in names)), alpha)
        if chosen is None:
            return 1.0
        return float(chosen) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale
