# SPDX-License-Identifier: Apache-2.0
"""Making a large model fit a card: offloading, narrower weights, tiles. Each switch is one of a library; here they are
brought together in an order that works, and with the layers that must stay precise left alone.

`talkingdit plan` says which switches a card needs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from talkingdit.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from talkingdit.nn.units import Units

WEIGHTS = ("native", "cast_fp8", "fp8", "int8")
OFFLOAD = ("none", "block", "leaf")
PRECISION = ("native", "fp8", "int8")


@dataclass(frozen=True)
class Memory:
    """What to trade for memory. The defaults trade nothing.

    Args:
        weights: how the transformer's large layers are kept: "native"; "cast_fp8" as float8 that each layer widens
            before it is used (diffusers' layerwise casting: half of bfloat16's memory, a few percent of time);
            "int8" or "fp8" quantised per channel by torchao, more precise than casting.
        offload: weights wait in host memory and come to the card "block" by block or "leaf" by leaf (diffusers' group
            offloading; with streams on CUDA the next group travels while one computes).
        residual: "float32", or "compute" for a residual stream in the dtype of the weights, half the size.
        absorb_audio: fold the output projection of audio attention into its values: less time, more memory per clip.
        text_encoder: "device", or "cpu" to encode prompts on the host.
        vae: "whole", or "tiled" to decode in tiles that overlap, whose seams can be seen in theory.
        precision: "native", or "fp8" or "int8": large layers compute in eight bits (docs/precision.md), their weights
            kept so too. Goes with native weights only.
    """

    weights: str = "native"
    offload: str = "none"
    residual: str = "float32"
    absorb_audio: bool = False
    text_encoder: str = "device"
    vae: str = "whole"
    precision: str = "native"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("weights", WEIGHTS),
            ("offload", OFFLOAD),
            ("residual", ("float32", "compute")),
            ("text_encoder", ("device", "cpu")),
            ("vae", ("whole", "tiled")),
            ("precision", PRECISION),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Memory: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.precision != "native" and self.weights != "native":
            raise ValueError(
                f"Memory: weights must be native where precision is {self.precision}, which keeps them in eight bits "
                f"itself, got {self.weights!r}"
            )

    @staticmethod
    def parse(text: str) -> Memory:
        """Switches as words: "weights=cast_fp8,text_encoder=cpu,absorb_audio".

        Raises:
            ValueError: an unknown switch or value.
        """
        values: dict[str, Any] = {}
        names = [field.name for field in dataclasses.fields(Memory)]
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = item.partition("=")
            if name not in names:
                raise ValueError(f"Memory: switches are {', '.join(names)}, got {name!r}")
            values[name] = value in ("", "yes", "true") if name == "absorb_audio" else value
        return Memory(**values)

    def __str__(self) -> str:
        """The switches that are not at their defaults, in the words that `parse` reads."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f.name if f.type == "bool" else f"{f.name}={getattr(self, f.name)}" for f in changed)


def out_of_memory(error: BaseException) -> bool:
    """Does an error say that memory is too small, that of a device or of the host?"""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # What torch raises where the host has no more is told by its words alone.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def fit(target: Any, memory: Memory, device: torch.device | str, units: Units) -> None:
    """Move a model or a whole checkpoint to a device, in less memory. Changes it in place, once.

    Args:
        target: a transformer on the host, or a checkpoint with `transformer`, `vae` and `text_encoder`.
        memory: what to trade.
        device: where to compute.
        units: of the model's family.

    Raises:
        UserError: quantised weights were asked for and torchao is not installed, or the model has no such switch.
        ValueError: the model is quantised, cast or offloaded already.
    """
    import torch
    from torch import nn

    device = torch.device(device)
    transformer = getattr(target, "transformer", target)
    if any(hasattr(module, "_diffusers_hook") for module in transformer.modules()):
        raise ValueError("fit: the model must be as it was loaded, got one with hooks of casting or offloading")
    _fit_transformer(transformer, memory, device, units)
    if transformer is target:
        return
    target.vae.to(device)
    if memory.vae == "tiled":
        target.vae.enable_tiling()
    target.text_encoder.to(device if memory.text_encoder == "device" else "cpu")
    audio_encoder = getattr(target, "audio_encoder", None)
    if isinstance(audio_encoder, nn.Module):
        audio_encoder.to(device)


def _fit_transformer(model: Any, memory: Memory, device: torch.device, units: Units) -> None:
    import torch

    _set_switches(model, memory)
    if memory.precision != "native":
        from talkingdit.nn.eight_bit import quantise

        quantise(model, units.UNITS, memory.precision)
    if memory.weights in ("int8", "fp8"):
        _quantise(model, memory.weights, units)
    elif memory.weights == "cast_fp8":
        narrowest = min((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=narrowest)
    if memory.offload == "none":
        model.to(device)
        return
    streams = device.type == "cuda"
    model.enable_group_offload(
        onload_device=device,
        offload_type=f"{memory.offload}_level",
        num_blocks_per_group=1 if memory.offload == "block" else None,
        use_stream=streams,
        low_cpu_mem_usage=streams,
    )
    if streams:
        with torch.no_grad():  # offloading learns from it in which order to fetch the layers
            model(**model.dummy_inputs)


def _set_switches(model: Any, memory: Memory) -> None:
    """Switches of the model's own: of how it computes, not of how it is kept."""
    wanted: dict[str, str] = {}
    if memory.absorb_audio:
        wanted["audio_absorb"] = "value"
    if memory.residual != "float32" or "residual_dtype" in model.config:
        wanted["residual_dtype"] = memory.residual
    for name in wanted:
        if name not in model.config:
            raise UserError(f"fit: {type(model).__name__} has no switch {name}.")
    model.register_to_config(**wanted)


def _quantise(model: Any, kind: str, units: Units) -> None:
    from torch import nn

    from talkingdit.nn.units import large_prefixes

    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(
            f"fit: weights={kind} needs torchao, which is not installed: pip install 'talkingdit[quant]'."
        ) from error

    prefixes = large_prefixes(units.UNITS)

    def large(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and name.startswith(prefixes)

    quantize_(model, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig(), filter_fn=large)
