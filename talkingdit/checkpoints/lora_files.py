# SPDX-License-Identifier: Apache-2.0
"""LoRA files of every trainer, read into one form: the changes of each weight under its native name.

`lora_names` knows how keys are spelt, `lora_parts` what a change is, `lora_config` what PEFT says beside the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from talkingdit.checkpoints.lora_config import PeftConfig, read_config, weights_of
from talkingdit.checkpoints.lora_names import IMAGE, NETWORK, REFUSED, ModuleNames, adapter_of, read_key
from talkingdit.checkpoints.lora_parts import Change, Hadamard, Instead, Kronecker, LowRank, Whole
from talkingdit.checkpoints.weights import Weights, open_weights, some
from talkingdit.errors import UserError


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file with its parts under the native names of the model's parameters."""

    source: Path
    changes: Mapping[str, tuple[Change, ...]]  # by parameter
    ignored: tuple[str, ...] = ()  # keys for layers of an image branch
    left: tuple[str, ...] = ()  # what fits nothing and was left out on demand: sentences


@dataclass
class _Misfits:
    """What fits nothing; told at once or at the end."""

    path: Path
    partial: bool
    unknown: list[str] = field(default_factory=list)  # keys of layers that the model does not have
    strange: list[str] = field(default_factory=list)  # keys of a kind that is not known
    shapes: list[str] = field(default_factory=list)  # sentences

    @property
    def sentences(self) -> list[str]:
        found = []
        if self.strange:
            found.append(f"has parts of a kind that is not supported: {some(self.strange)}")
        if self.unknown:
            found.append(f"has parts for layers that the model does not have: {some(self.unknown)}")
        return found + self.shapes

    def raise_if_any(self) -> None:
        if self.sentences and not self.partial:
            raise UserError(
                f"{self.path}: {some(self.sentences)}. Nothing of it was applied; `--lora-partial` (partial=True in "
                "Python) applies what fits."
            )


def read_lora(source: str | Path, model: nn.Module, partial: bool = False) -> LoraFile:
    """Read a LoRA file.

    Args:
        source: a .safetensors, .pt or .bin file, or a folder of PEFT or diffusers with one.
        model: tells what parameters are called and which shapes they have. It is only read, and may be on meta.
        partial: leave out what fits nothing, and say so in `LoraFile.left`.

    Raises:
        UserError: not such a file, an adapter that is no sum of matrices (DoRA), matrices that do not belong together
            or are not finite, or parts that fit nothing in the model.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: there is no such LoRA file or folder.")
    weights = open_weights(weights_of(path))
    config = read_config(path, weights)
    misfits = _Misfits(path, partial)
    places = ModuleNames(model)
    parts, ignored = _sorted_keys(weights, places, misfits)
    kinds = {what for part in parts.values() for what in part}
    if not parts and not ignored and not misfits.unknown:
        said = f" ({some(misfits.strange)})" if misfits.strange else ""
        raise UserError(f"{path}: not a LoRA file of a kind that is supported{said}.")
    if parts and kinds <= {"new weight", "new bias"}:
        raise UserError(f"{path}: holds whole weights and no LoRA; it may be a checkpoint.")
    misfits.raise_if_any()
    tensors = _tensors(path, weights, parts)
    reader = _Reader(path, config, "lokr_factor" in weights.entries, misfits, places.shapes)
    for owner, part in parts.items():
        reader.read(owner, {what: tensors[key] for what, key in part.items()})
    misfits.raise_if_any()
    if not reader.changes:
        left = f" ({some(misfits.sentences)})" if misfits.sentences else ""
        raise UserError(f"{path}: holds nothing for this model{left}.")
    return LoraFile(path, {name: tuple(c) for name, c in reader.changes.items()}, ignored, tuple(misfits.sentences))


def _sorted_keys(
    weights: Weights, places: ModuleNames, misfits: _Misfits
) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Keys by the module or parameter that they are for and by what they are; and those for an image branch."""
    parts: dict[str, dict[str, str]] = {}
    ignored: list[str] = []
    adapters = {adapter_of(key) for key in weights.entries if ".lora_" in key}
    if len(adapters) > 1:
        names = ", ".join(sorted(name or "one without a name" for name in adapters))
        raise UserError(f"{misfits.path}: holds {len(adapters)} adapters ({names}); keep one in a file.")
    for key in weights.entries:
        for pattern, kind in REFUSED:
            if pattern.search(key):
                raise UserError(f"{misfits.path}: {key} is a part of {kind}, which is not supported.")
        found = read_key(key)
        if key in NETWORK:
            continue
        if found is None:
            misfits.strange.append(key)
            continue
        owner = places.module(found.place)
        what = found.what
        if owner is None and what == "weight" and (owner := places.parameter(found.place)) is not None:
            what = "parameter"
        if owner is None:
            (ignored if IMAGE.search(key) else misfits.unknown).append(key)
        elif (other := parts.setdefault(owner, {}).setdefault(what, key)) != key:
            raise UserError(f"{misfits.path}: {other} and {key} are the same part of {owner}.")
    return parts, tuple(ignored)


def _tensors(path: Path, weights: Weights, parts: Mapping[str, Mapping[str, str]]) -> dict[str, Tensor]:
    tensors = weights.read(key for part in parts.values() for key in part.values())
    for key, value in tensors.items():
        if not value.dtype.is_floating_point and not key.endswith(".alpha"):
            raise UserError(f"{path}: {key} must hold floating point numbers, got {value.dtype}.")
        if not torch.isfinite(value.float()).all():
            raise UserError(f"{path}: {key} has values that are not finite; the training went wrong or it is damaged.")
    return tensors


class _Reader:
    """Makes changes of a module's tensors.

    Args:
        path: what messages call the file.
        config: beside it.
        factor_scale: LoKr as musubi-tuner writes it, which scales a whole second factor by its larger side; LyCORIS
            scales it by 1.
        misfits: takes what fits nothing.
        shapes: of the model's parameters.
    """

    def __init__(
        self,
        path: Path,
        config: PeftConfig,
        factor_scale: bool,
        misfits: _Misfits,
        shapes: Mapping[str, tuple[int, ...]],
    ):
        self.path, self.config, self.factor_scale, self.misfits = path, config, factor_scale, misfits
        self.shapes = shapes
        self.changes: dict[str, list[Change]] = {}

    def read(self, owner: str, tensors: Mapping[str, Tensor]) -> None:
        """All that a file says of a module, or of a parameter of its own."""
        scale = 1.0
        if "down" in tensors or "up" in tensors:
            down, up = self._both(owner, tensors, "down", "up")
            scale = self._scale(owner, tensors, len(down))
            self._add_matrices(owner, LowRank(down, up, scale), (down, up))
        if any(what.startswith("hada_") for what in tensors):
            (a1, b1), (a2, b2) = (self._both(owner, tensors, f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2))
            self._add_matrices(owner, Hadamard(a1, b1, a2, b2, self._scale(owner, tensors, len(b1))), (a1, b1, a2, b2))
        if any(what.startswith("lokr_") for what in tensors):
            change = self._kronecker(owner, tensors)
            self._add_matrices(owner, change, (change.w1, change.w2))
        if "up_bias" in tensors:
            self._add_value(f"{owner}.bias", Whole(tensors["up_bias"].float() * scale))
        for what, leaf in (("weight", ".weight"), ("bias", ".bias"), ("modulation", ".modulation"), ("parameter", "")):
            if what in tensors:
                self._add_value(f"{owner}{leaf}", Whole(tensors[what]))
        for what in ("weight", "bias"):
            if (value := tensors.get(f"new {what}")) is not None:
                self._add_value(f"{owner}.{what}", Instead(value))

    def _add_matrices(self, owner: str, change: Change, matrices: tuple[Tensor, ...]) -> None:
        shape = self.shapes.get(f"{owner}.weight")
        if shape is not None and len(shape) > 1 and change.fits(shape):
            self.changes.setdefault(f"{owner}.weight", []).append(change)
            return
        sizes = " and ".join(str(list(matrix.shape)) for matrix in matrices)
        said = None if shape is None else list(shape)
        self.misfits.shapes.append(f"has matrices of {owner} that are {sizes}, which does not fit its weight {said}")

    def _add_value(self, name: str, change: Whole | Instead) -> None:
        shape = self.shapes.get(name)
        if shape is not None and change.fits(shape):
            self.changes.setdefault(name, []).append(change)
            return
        got = "there is not" if shape is None else f"is {list(shape)}"
        self.misfits.shapes.append(f"changes {name} by {list(change.value.shape)}, which {got}")

    def _both(self, owner: str, tensors: Mapping[str, Tensor], one: str, other: str) -> tuple[Tensor, Tensor]:
        if one not in tensors or other not in tensors:
            raise UserError(f"{self.path}: has only one of the two matrices of {owner}.")
        first, second = tensors[one], tensors[other]
        inner = (len(first), second.shape[1]) if one == "down" else (first.shape[1], len(second))
        if min(first.dim(), second.dim()) < 2 or inner[0] != inner[1] or not inner[0]:
            raise UserError(
                f"{self.path}: the matrices of {owner} do not belong together: {list(first.shape)} and "
                f"{list(second.shape)}."
            )
        return first, second

    def _scale(self, owner: str, tensors: Mapping[str, Tensor], rank: int) -> float:
        if "alpha" not in tensors:
            return self.config.scale(owner, rank)
        if tensors["alpha"].numel() != 1:
            raise UserError(f"{self.path}: alpha of {owner} must be one number, got {list(tensors['alpha'].shape)}.")
        return tensors["alpha"].item() / rank

    def _kronecker(self, owner: str, tensors: Mapping[str, Tensor]) -> Kronecker:
        factors, rank = [], None
        for name in ("lokr_w1", "lokr_w2"):
            if name in tensors:
                factors.append(tensors[name])
                continue
            a, b = self._both(owner, tensors, f"{name}_a", f"{name}_b")
            factors.append((a.float() @ b.float().flatten(1)).reshape(len(a), *b.shape[1:]))
            rank = len(b)
        if rank is None and self.factor_scale:
            rank = max(factors[1].shape)
        if rank is None:  # both whole
            rank = self.config.rank
            scale = 1.0 if rank is None else self.config.scale(owner, rank)
        else:
            scale = self._scale(owner, tensors, rank)
        if factors[0].dim() != 2 or factors[1].dim() < 2 or not math.isfinite(scale):
            raise UserError(f"{self.path}: the Kronecker factors of {owner} must be matrices.")
        return Kronecker(factors[0], factors[1], scale)
