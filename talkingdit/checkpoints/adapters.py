# SPDX-License-Identifier: Apache-2.0
"""Changes beside the weights of linear layers: a hook on a layer adds to its output what the changed weight would.

The layer, its weight and the names of a model stay as they are. So it makes no difference where weights wait (host
memory, disk), how narrow they are stored or which library quantised them, and what is taken off again leaves no trace.
The matrices themselves stay on the device that computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from talkingdit.checkpoints.lora_parts import Change, Whole, moved
from talkingdit.errors import UserError


@dataclass(frozen=True)
class AdapterPart:
    """What one file adds to a layer."""

    strength: float
    weight: tuple[Change, ...] = ()
    bias: tuple[Whole, ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype) -> AdapterPart:
        weight = tuple(moved(change, device, dtype) for change in self.weight)
        return AdapterPart(self.strength, weight, tuple(moved(change, device, dtype) for change in self.bias))


class Adapter:
    """A forward hook of a linear layer."""

    def __init__(self, parts: Sequence[AdapterPart], device: torch.device, dtype: torch.dtype):
        self._given = tuple(parts)
        self._place = (device, dtype)
        self._parts = [part.to(device, dtype) for part in parts]

    def __call__(self, layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        if self._place != (output.device, output.dtype):  # moved or cast after it was put on
            self._place = (output.device, output.dtype)
            self._parts = [part.to(*self._place) for part in self._given]
        x = given[0].to(output.device, output.dtype)
        for part in self._parts:
            for change in part.weight:
                output = output + part.strength * change.added(x)
            for bias in part.bias:
                output = output + part.strength * bias.value.reshape(-1)
        return output


def attach(layer: nn.Module, parts: Sequence[AdapterPart], device: torch.device) -> None:
    """Put the parts on a linear layer in the dtype that it computes in, in the place of those that it has.

    Args:
        device: that computes.
    """
    detach(layer)
    if parts:
        layer.register_forward_hook(Adapter(parts, device, _compute_dtype(layer)))


def detach(layer: nn.Module) -> None:
    """Take all parts off a layer."""
    for key in [key for key, hook in layer._forward_hooks.items() if isinstance(hook, Adapter)]:
        del layer._forward_hooks[key]


def has_adapters(model: nn.Module) -> bool:
    """Has any layer parts, ours or PEFT's?"""
    ours = any(isinstance(hook, Adapter) for module in model.modules() for hook in module._forward_hooks.values())
    return ours or bool(getattr(model, "peft_config", None))


def refuse_adapters(model: nn.Module, target: object) -> None:
    """Raises: UserError: the model has adapters, which a file of its weights would lack."""
    if has_adapters(model):
        raise UserError(f"{target}: the model has adapters; merge or unload them before it is saved.")


def _compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of a layer's output; where that is not known in advance, the first call corrects it."""
    registry = getattr(layer, "_diffusers_hook", None)
    casting = None if registry is None else registry.get_hook("layerwise_casting")
    dtype: Any = casting.compute_dtype if casting is not None else getattr(layer, "weight", torch.empty(0)).dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16
