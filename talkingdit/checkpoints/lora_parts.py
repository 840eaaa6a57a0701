# SPDX-License-Identifier: Apache-2.0
"""What a LoRA file says of one weight: its change, as a matrix to add and as what a linear layer adds to its output.

    low rank      scale up @ down                                 LoRA
    Hadamard      scale (a1 @ b1) * (a2 @ b2), elementwise        LoHa (arXiv:2108.06098)
    Kronecker     scale w1 (x) w2, each whole or a product        LoKr (arXiv:2309.14859)
    whole         a difference, or a value that takes the weight's place

A strength multiplies all of them: weight + strength * change.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


class Change(Protocol):
    """The change of one weight."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Is it a change of a weight of this shape?"""

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to a weight at strength 1: float32, of its shape, on its device."""

    def added(self, x: Tensor) -> Tensor:
        """What a linear layer's output gets for an input [..., in] at strength 1: [..., out], in the input's dtype."""


@dataclass(frozen=True)
class LowRank:
    """scale * up @ down, over the flattened inputs of a convolution."""

    down: Tensor  # [rank, in, ...]
    up: Tensor  # [out, rank, ...]
    scale: float

    def fits(self, shape: tuple[int, ...]) -> bool:
        out, inside = shape[0], _count(shape[1:])
        rank = self.down.shape[0]
        return (self.up.shape[0], self.up[0].numel(), self.down[0].numel()) == (out, rank, inside)

    def delta(self, weight: Tensor) -> Tensor:
        up, down = (part.to(weight.device, torch.float32).flatten(1) for part in (self.up, self.down))
        return (self.scale * (up @ down)).reshape(weight.shape)

    def added(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.down.to(x.dtype).flatten(1))
        return F.linear(low, self.up.to(x.dtype).flatten(1)) * self.scale


@dataclass(frozen=True)
class Hadamard:
    """scale * (a1 @ b1) * (a2 @ b2), elementwise."""

    a1: Tensor  # [out, rank]
    b1: Tensor  # [rank, in]
    a2: Tensor  # [out, rank]
    b2: Tensor  # [rank, in]
    scale: float

    def fits(self, shape: tuple[int, ...]) -> bool:
        sizes = {(len(a), b[0].numel(), a.shape[1] == len(b)) for a, b in ((self.a1, self.b1), (self.a2, self.b2))}
        return sizes == {(shape[0], _count(shape[1:]), True)}

    def delta(self, weight: Tensor) -> Tensor:
        a1, b1, a2, b2 = (p.to(weight.device, torch.float32).flatten(1) for p in (self.a1, self.b1, self.a2, self.b2))
        return (self.scale * (a1 @ b1) * (a2 @ b2)).reshape(weight.shape)

    def added(self, x: Tensor) -> Tensor:
        return F.linear(x, self.delta(x.new_empty(len(self.a1), self.b1[0].numel())).to(x.dtype))


@dataclass(frozen=True)
class Kronecker:
    """scale * (w1 kron w2), over the flattened inputs of a convolution."""

    w1: Tensor  # [a, b]
    w2: Tensor  # [c, d, ...]: the weight is [a c, b d, ...]
    scale: float

    def fits(self, shape: tuple[int, ...]) -> bool:
        (a, b), (c, d), rest = self.w1.shape, self.w2.shape[:2], tuple(self.w2.shape[2:])
        return shape[0] == a * c and _count(shape[1:]) == b * d * _count(rest) and (not rest or shape[2:] == rest)

    def delta(self, weight: Tensor) -> Tensor:
        w1, w2 = (part.to(weight.device, torch.float32) for part in (self.w1, self.w2))
        whole = torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - 2)), w2)
        return (self.scale * whole).reshape(weight.shape)

    def added(self, x: Tensor) -> Tensor:
        w1, w2 = (part.to(x.dtype) for part in (self.w1, self.w2))
        blocks = x.unflatten(-1, (w1.shape[1], w2.shape[1]))  # [..., b, d]
        return (w1 @ F.linear(blocks, w2) * self.scale).flatten(-2)


@dataclass(frozen=True)
class Whole:
    """A difference of the whole weight."""

    value: Tensor

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.value.numel() == _count(shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.device, torch.float32).reshape(weight.shape)

    def added(self, x: Tensor) -> Tensor:
        return F.linear(x, self.value.to(x.dtype).reshape(-1, x.shape[-1]))


@dataclass(frozen=True)
class Instead:
    """A value that takes the weight's place at strength 1."""

    value: Tensor

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.value.numel() == _count(shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.device, torch.float32).reshape(weight.shape) - weight.to(torch.float32)

    def added(self, x: Tensor) -> Tensor:
        raise TypeError("Instead: what a layer adds depends on its weight; take `Whole` of the difference")


def moved(change: T, device: torch.device, dtype: torch.dtype) -> T:
    """The same change with its matrices on a device in a dtype."""
    values: dict[str, Any] = {field.name: getattr(change, field.name) for field in fields(change)}  # type: ignore[arg-type]
    placed = {name: value.to(device, dtype) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(change, **placed)  # type: ignore[type-var]


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
