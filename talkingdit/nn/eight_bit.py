# SPDX-License-Identifier: Apache-2.0
"""Linear layers that compute in eight bits, and norms and activations that give them what they compute with.

`quantise` puts them into a model for inference. A layer that is given numbers makes rows in eight bits of them itself,
in one pass; a model that calls `norm_modulate` and `gate_residual_norm_modulate` of this module in the place of the ops
saves that pass, with the same bits (`contract="exact"`, see `talkingdit.ops.eight_bit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.nn.units import Unit, large_prefixes
from talkingdit.ops import EightBitRows
from talkingdit.ops.eight_bit import CONTRACTS, KINDS

PRECISIONS = tuple(KINDS)


class EightBitLinear(nn.Module):
    """A linear layer whose weight has a scale for every output, and that rounds its inputs row by row.

    Codes and scales are buffers, codes as int8 whatever they mean, so that nothing casts them.

    Args:
        layer: whose weight it takes; the bias stays as it is.
        kind: "int8" or "fp8".
        contract: of norms and activations in front of it.
    """

    codes: Tensor  # [out, in]
    scale: Tensor  # [out] float32

    def __init__(self, layer: nn.Linear, kind: str, contract: str = "exact") -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.contract = kind, contract
        weight = layer.weight.detach()
        if weight.device.type == "meta":
            codes, scale = weight.to(torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
        else:
            codes, scale, _ = ops.quantise_rows(weight, kind)
        self.register_buffer("codes", codes.view(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor | EightBitRows) -> Tensor:
        """[..., in] numbers or rows -> [..., out] in their dtype."""
        rows = x if isinstance(x, EightBitRows) else ops.quantise_rows(x, self.kind)
        return ops.eight_bit_linear(rows, self.codes.view(KINDS[self.kind]), self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}, {self.contract}"


class EightBitGelu(nn.Module):
    """GELU with tanh in front of an `EightBitLinear`: numbers -> rows in eight bits."""

    def __init__(self, kind: str, contract: str = "exact") -> None:
        super().__init__()
        self.kind, self.contract = kind, contract

    def forward(self, x: Tensor) -> EightBitRows:
        return ops.quantise_rows(x, self.kind, "gelu_tanh", self.contract)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.contract}"


def quantise(model: nn.Module, units: Sequence[Unit], kind: str, contract: str = "exact") -> list[str]:
    """Let the linear layers of a model's large units compute in eight bits, in place; without gradients from then on.

    Args:
        model: adapters, if there are any, merged into it.
        units: of its family.
        kind: "int8" or "fp8".
        contract: "exact" or "close".

    Returns:
        Paths of the layers.

    Raises:
        ValueError: another kind or contract, or nothing to quantise.
    """
    for name, value, allowed in (("kind", kind, PRECISIONS), ("contract", contract, CONTRACTS)):
        if value not in allowed:
            raise ValueError(f"quantise: {name} must be one of {', '.join(allowed)}, got {value!r}")
    prefixes = large_prefixes(units)
    found = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and name.startswith(prefixes)]
    if not found:
        raise ValueError("quantise: the model has no plain linear layer in its large units")
    for path in found:
        parent, _, name = path.rpartition(".")
        layer: Any = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, EightBitLinear(layer, kind, contract))
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            _fuse_activations(module)
    model.requires_grad_(False)
    return found


def _fuse_activations(sequence: nn.Sequential) -> None:
    for i in range(len(sequence) - 1):
        layer, following = sequence[i], sequence[i + 1]
        if isinstance(layer, nn.GELU) and layer.approximate == "tanh" and isinstance(following, EightBitLinear):
            sequence[i] = EightBitGelu(following.kind, following.contract)


class NormOptions(NamedTuple):
    """How rows are normalised and modulated, as `ops.norm_modulate` has it."""

    groups: int | list[int]
    eps: float
    token_offset: int
    dtype: torch.dtype


def norm_modulate(layer: Any, x: Tensor, scale: Tensor, shift: Tensor, how: NormOptions) -> Tensor | EightBitRows:
    """`ops.norm_modulate` for a linear layer that multiplies it first: numbers, or rows for an `EightBitLinear`."""
    groups, eps, token_offset, dtype = how
    if not isinstance(layer, EightBitLinear):
        return ops.norm_modulate(x, scale, shift, groups, eps, token_offset, dtype)
    return ops.norm_modulate_eight_bit(
        x, scale, shift, layer.kind, groups, eps, token_offset, dtype=dtype, contract=layer.contract
    )


def gate_residual_norm_modulate(
    layer: Any, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, how: NormOptions, inplace: bool
) -> tuple[Tensor, Tensor | EightBitRows]:
    """`ops.gate_residual_norm_modulate` for a linear layer as above; `inplace` writes the residual over x."""
    groups, eps, token_offset, dtype = how
    if isinstance(layer, EightBitLinear) and y.dtype == dtype:
        return ops.gate_residual_norm_modulate_eight_bit(
            *(x, y, gate, scale, shift, layer.kind, groups, eps),
            token_offset=token_offset,
            contract=layer.contract,
            out=x if inplace else None,
        )
    out = (x, torch.empty_like(y, dtype=dtype)) if inplace else None
    return ops.gate_residual_norm_modulate(x, y, gate, scale, shift, groups, eps, token_offset, dtype=dtype, out=out)
