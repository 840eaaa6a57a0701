# SPDX-License-Identifier: Apache-2.0
"""What does not train takes less room: frozen weights in half precision, or the large matrices in eight bits.

A run of adapters reads most of its weights and changes none, so they need neither float32 nor a place on the card. In
"bf16" everything that the model computes with in bfloat16 is stored so: to the bit the same run, for float32 is rounded
to bfloat16 in front of every product anyway. In "int8" and "fp8" the matrices of large units have eight bits a weight
and a float32 scale a row: another model, nearly, which adapters learn to work with. They are neither parameters nor
buffers, so nobody shards, casts, moves or saves them; every process holds all of them, and under `parallel.offload` on
the host, from where each comes when it is used and goes at once.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkingdit.errors import UserError
from talkingdit.nn.units import Units, modules_of, unit_of
from training.host import HOST
from training.sections import ModelConfig
from training.stages import TRANSFORMER, plain_name

EIGHT_BITS: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Eight-bit codes [rows, columns] of a matrix, and float32 scales [rows, 1]: weight = scale x code, nearly.

    Args:
        kind: "int8" (the largest of a row is 127, the others are rounded to the nearest) or "fp8" (e4m3, largest 448).
    """
    dtype, most = EIGHT_BITS[kind]
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * most) / most
    codes = wide / scale
    return (codes.round() if kind == "int8" else codes).clamp(-most, most).to(dtype), scale


class _Product(torch.autograd.Function):
    """x W^T with a weight that is made for the moment, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.widened(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.widened(grad), None


class FrozenLinear(nn.Module):
    """A linear layer whose weight is stored in eight bits and never trains.

    Args:
        layer: whose place it takes; its bias stays a parameter, its weight is forgotten.
        kind: of `quantise`.
        home: where codes and scales stay; on the host they are pinned if they are used on a GPU.
    """

    def __init__(self, layer: nn.Linear, kind: str, home: torch.device, pinned: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.home, self.pinned = home, pinned
        self.bias = layer.bias
        self._codes: Tensor | None = None
        self._scale: Tensor | None = None

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Take over a weight [out, in] of any floating dtype."""
        stored = [part.to(self.home) for part in quantise(weight, self.kind)]
        self._codes, self._scale = [part.pin_memory() for part in stored] if self.pinned else stored

    def widened(self, like: Tensor) -> Tensor:
        """The weight [out, in] in the dtype and on the device of another tensor."""
        if self._codes is None or self._scale is None:
            raise RuntimeError("FrozenLinear: used before it was filled")
        codes, scale = (part.to(like.device, non_blocking=True) for part in (self._codes, self._scale))
        return codes.float().mul_(scale).to(like.dtype)

    def stored(self) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return () if self._codes is None or self._scale is None else (self._codes, self._scale)

    @property
    def weight(self) -> Tensor:
        """The weight as it is used, float32 where it is stored."""
        return self.widened(torch.empty(0, device=self.home))

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def narrow(
    transformer: Any, units: Units, model: ModelConfig, trained: Container[str], home: torch.device, swap: bool
) -> None:
    """Store frozen weights as `model.frozen` says. Call it on a model without weights ("meta"), before it is sharded.

    Args:
        transformer: adapters, if there are any, are on it.
        units: of its family.
        model: `frozen` and `swap` of it.
        trained: plain names of what trains.
        home: where eight-bit weights stay, but for those of units that are swapped.
        swap: everything stays on the host.
    """
    how = model.frozen
    if how == "float32":
        return
    if how in EIGHT_BITS:
        swapped = units.walk(transformer.config)[: None if swap else model.swap]
        for path, layer in _frozen_matrices(transformer, units, trained):
            parent, _, name = path.rpartition(".")
            where = HOST if unit_of(path, units.UNITS)[0] in swapped else home
            pinned = where == HOST and home.type == "cuda"
            setattr(transformer.get_submodule(parent), name, FrozenLinear(layer, how, where, pinned))
    for name, parameter in transformer.named_parameters():
        plain = plain_name(name)
        unit = unit_of(plain, units.UNITS)[1]
        if TRANSFORMER + plain not in trained and not (unit is not None and unit.float32):
            parameter.data = parameter.data.bfloat16()


def _frozen_matrices(model: nn.Module, units: Units, trained: Container[str]) -> list[tuple[str, nn.Linear]]:
    found = []
    for path, module, unit in modules_of(model, units.UNITS):
        for inner, layer in module.named_modules() if unit.large else ():
            name = f"{path}.{inner}"
            if type(layer) is nn.Linear and TRANSFORMER + plain_name(f"{name}.weight") not in trained:
                found.append((name, layer))
    return [(name, layer) for name, layer in found if ".lora_" not in name]


def frozen_layers(module: nn.Module) -> dict[str, FrozenLinear]:
    """Eight-bit layers by the plain names that their weights have in files."""
    return {
        plain_name(f"{path}.weight"): layer for path, layer in module.named_modules() if isinstance(layer, FrozenLinear)
    }


def check_frozen(model: ModelConfig, lora_rank: int, trained: set[str]) -> None:
    """Whether frozen weights can be stored as `model.frozen` says.

    Raises:
        UserError: eight bits without weights to read, or in a run that changes or exports what they would be.
    """
    how = model.frozen
    if how not in EIGHT_BITS:
        if model.swap:
            raise UserError(f'model.swap: moves weights in eight bits, got {model.swap} with model.frozen = "{how}".')
        return
    if model.start is None:
        raise UserError(f'model.frozen: "{how}" needs model.start, weights to store so; got none.')
    others = sorted(name for name in trained if ".lora_" not in name)
    if lora_rank < 1 or others:
        got = f"{others[0]} trains" if others else "lora.rank is 0"
        raise UserError(f'model.frozen: "{how}" is for runs that train adapters alone, got one in which {got}.')
