# SPDX-License-Identifier: Apache-2.0
"""The kernels inside models that people already have: `accelerate` puts them in, `restore` takes them out again.

Nothing of a model is rebuilt. Its modules, parameters, names and hooks stay; what changes is the `forward` of its
blocks and the processors of its attention, each on the object and each reversible.
"""

from __future__ import annotations

from torch import nn

from talkingdit.nn.accelerate import comfy_wan, diffusers_hunyuan, diffusers_wan, official_avatar, official_wan
from talkingdit.nn.accelerate.replacement import put_back
from talkingdit.nn.accelerate.report import Report

__all__ = ["Report", "accelerate", "restore"]

_KINDS = (
    "WanTransformer3DModel, WanVACETransformer3DModel, WanAnimateTransformer3DModel and SkyReelsV2Transformer3DModel "
    "of diffusers, its HunyuanVideoTransformer3DModel, the official WanModel, WanModel_S2V and HunyuanVideo-Avatar, "
    "and the Wan models of ComfyUI"
)


def accelerate(model: nn.Module) -> Report:
    """Computes a model's normalisation, modulation, gates and rotary embedding with the fused ops.

    Knows diffusers' Wan, Wan-VACE, Wan-Animate, SkyReels-V2 and HunyuanVideo transformers, and by their attributes
    the official WanModel and WanModel_S2V, the audio adapters of HunyuanVideo-Avatar, and the Wan models of
    ComfyUI; any of them may lie inside a wrapper (PEFT, FSDP, DDP, `torch.compile`). Outputs and gradients are the
    same up to rounding. Linear layers are called as they are, so that LoRA and quantised ones keep working;
    attention runs through the backend, and the context parallelism, that the model is set to, now or later.
    Parameters, state dict, gradient checkpointing and compilation are as before.

    What cannot be replaced faithfully (a module with hooks over its `forward`, a class of another signature, a custom
    attention processor) is left as it is, and the report says so. Call it before offloading hooks are put on blocks.

    Args:
        model: a module in memory, on any device, in any dtype.

    Returns:
        What was replaced and what was not; print it. Called again, nothing changes and the report says so.

    Raises:
        ValueError: `model` is not a module or holds no transformer of a known kind.
    """
    if not isinstance(model, nn.Module):
        hint = "; pass its transformer" if hasattr(model, "transformer") else ""
        raise ValueError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    report = Report(type(model).__name__)
    kinds = (comfy_wan, diffusers_wan, official_wan, diffusers_hunyuan, official_avatar)
    # A module that one kind knows is none of another's.
    known = [any(kind.replace(module, report) for kind in kinds) for module in model.modules()]
    if not any(known):
        raise ValueError(f"accelerate: model must be one of {_KINDS}, got {type(model).__name__}")
    return report


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`: the model computes bit for bit what it computed before. Does nothing where there is nothing
    to undo.

    Raises:
        ValueError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        put_back(module)
        diffusers_wan.put_back(module)
        diffusers_hunyuan.put_back(module)
