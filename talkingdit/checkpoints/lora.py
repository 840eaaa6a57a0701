# SPDX-License-Identifier: Apache-2.0
"""LoRA files on a model: beside the weights as adapters, or merged into them, and off again without a trace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from talkingdit.checkpoints.adapters import AdapterPart, attach, detach, has_adapters
from talkingdit.checkpoints.in_place import InPlace
from talkingdit.checkpoints.lora_files import LoraFile, read_lora
from talkingdit.checkpoints.lora_parts import Change, Instead, Whole
from talkingdit.errors import UserError


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA file did to a model."""

    name: str
    adapted: int  # layers that got an adapter
    changed: int  # parameters whose values change themselves (norms, convolutions; after `merge` all)
    ignored: tuple[str, ...]  # keys for the image branch of I2V models
    left: tuple[str, ...] = ()  # what fits nothing and was left out on demand: sentences

    def __str__(self) -> str:
        rest = f", {len(self.ignored)} parts for an image branch left aside" if self.ignored else ""
        rest += "".join(f"; left out: {sentence}" for sentence in self.left)
        return f"{self.name}: {self.adapted} layers adapted, {self.changed} parameters changed{rest}"


class Loras:
    """The LoRA files of one model.

    Linear layers get adapters beside their weights, in the dtype that they compute in, so that weights may be
    quantised, cast or offloaded, before or after, and strengths change at once. What has no adapter - norms, biases,
    convolutions, whole-weight differences - is changed in place, and the original values are kept on the CPU. `merge`
    does the same with every layer, which is faster to run and takes a copy of the changed weights in host memory,
    unless it is told not to keep one. Whatever is unloaded leaves the weights bit for bit as they were.

    Args:
        model: a diffusers model with native names, `WanS2VModel`. There must be one `Loras` for a model at most.
    """

    def __init__(self, model: Any):
        if has_adapters(model):
            raise ValueError("Loras: the model has adapters already; remove them first (unload, unload_lora)")
        self._model = model
        self._files: dict[str, LoraFile] = {}
        self._strengths: dict[str, float] = {}
        self._in_place = InPlace(model)
        self._merged = False
        self._final = False  # merged without originals to go back to

    @property
    def strengths(self) -> dict[str, float]:
        """Strength of each file by name."""
        return dict(self._strengths)

    @property
    def merged(self) -> bool:
        return self._merged

    def load(
        self, source: str | Path, name: str | None = None, strength: float = 1.0, *, partial: bool = False
    ) -> LoraReport:
        """Add a file.

        Args:
            source: see `read_lora`.
            name: for later calls; default: the file name without its ending.
            strength: factor of all its changes; 0 is none.
            partial: leave out what fits nothing, instead of refusing the file.

        Raises:
            UserError: see `read_lora`; the model is then as it was.
            ValueError: the name is taken, or the strength is not a number.
        """
        name = Path(source).stem.replace(".", "_") if name is None else name
        if not name or "." in name:
            raise ValueError(f"Loras: name must not be empty or have a dot, got {name!r}")
        if name in self._files:
            raise ValueError(f"Loras: there is a LoRA {name!r} already; unload it or choose another name")
        strength = _number(strength)
        self._check_open()
        file = self._resolved(read_lora(source, self._model, partial))
        if self._merged:
            self._check_plain(file)
        self._files[name], self._strengths[name] = file, strength
        try:
            self._apply()
        except BaseException:
            del self._files[name], self._strengths[name]
            self._apply()
            raise
        adapted = {self._owner(parameter) for parameter in file.changes if self._has_adapter(parameter)}
        changed = sum(not self._has_adapter(parameter) for parameter in file.changes)
        return LoraReport(name, len(adapted), changed, file.ignored, file.left)

    def set_strength(self, name: str, strength: float) -> None:
        """Change the strength of one file.

        Raises:
            ValueError: there is no file of this name, or the strength is not a number.
        """
        self._known(name)
        self._check_open()
        self._strengths[name] = _number(strength)
        self._apply()

    def merge(self, keep_originals: bool = True) -> None:
        """Add all changes to the weights and take the adapters away.

        Args:
            keep_originals: keep a copy of the changed weights on the CPU. Without it nothing can be changed or unloaded
                any more.

        Raises:
            UserError: weights are stored in 8 or fewer bits.
        """
        self._check_open()
        if not self._merged:
            for file in self._files.values():
                self._check_plain(file)
            self._merged = True
            self._apply(keep_originals)
        if not keep_originals:
            self._in_place.forget()
            self._final = True

    def unmerge(self) -> None:
        """Back to adapters; the weights are again what they were."""
        self._check_open()
        if self._merged:
            self._merged = False
            self._apply()

    def unload(self, name: str | None = None) -> None:
        """Take one file, or all, off the model again.

        Raises:
            ValueError: there is no file of this name.
        """
        names = list(self._files) if name is None else [self._known(name)]
        self._check_open()
        for gone in names:
            del self._files[gone], self._strengths[gone]
        self._apply()

    def _known(self, name: str) -> str:
        if name not in self._files:
            raise ValueError(f"Loras: there is no LoRA {name!r}, only {', '.join(self._files) or 'none'}")
        return name

    def _check_open(self) -> None:
        if self._final:
            raise UserError("LoRAs were merged without keeping the original weights; load the model again.")

    def _check_plain(self, file: LoraFile) -> None:
        """Raises: UserError: a layer that the file changes has weights that nothing can be added to."""
        for name in file.changes:
            if isinstance(self._layer(name), nn.Linear) and not _is_plain(self._model.get_parameter(name)):
                module = self._owner(name)
                raise UserError(f"{module}: a LoRA cannot be merged into quantised weights; use it unmerged.")

    def _resolved(self, file: LoraFile) -> LoraFile:
        """The file with differences where it has new values."""

        def difference(name: str, change: Change) -> Change:
            if not isinstance(change, Instead):
                return change
            parameter = self._model.get_parameter(name)
            if not (_is_plain(parameter) or parameter.dtype.is_floating_point):
                raise UserError(f"{file.source}: has a new value for {name}, whose weights are quantised.")
            return Whole(change.delta(self._in_place.original(name).cpu()))

        changes = {name: tuple(difference(name, change) for change in some) for name, some in file.changes.items()}
        return LoraFile(file.source, changes, file.ignored, file.left)

    def _owner(self, parameter: str) -> str:
        return parameter.rpartition(".")[0]

    def _layer(self, parameter: str) -> nn.Module:
        return self._model.get_submodule(self._owner(parameter))

    def _has_adapter(self, parameter: str) -> bool:
        """Is a parameter of a linear layer left as it is? Differences are added to it, where its dtype bears that."""
        if self._merged or not isinstance(self._layer(parameter), nn.Linear):
            return False
        changes = [change for file in self._files.values() for change in file.changes.get(parameter, ())]
        whole = all(isinstance(change, Whole) for change in changes)
        return not whole or not _is_plain(self._model.get_parameter(parameter))

    def _apply(self, keep_originals: bool = True) -> None:
        """Adapters on the layers that have them, and new values for other parameters."""
        layers: dict[str, list[AdapterPart]] = {}
        in_place: dict[str, None] = {}
        for name, file in self._files.items():
            of_layer: dict[str, dict[str, tuple[Any, ...]]] = {}
            for parameter, changes in file.changes.items():
                module, _, leaf = parameter.rpartition(".")
                if self._has_adapter(parameter):
                    of_layer.setdefault(module, {})[leaf] = changes
                else:
                    in_place[parameter] = None
            for module, parts in of_layer.items():
                layers.setdefault(module, []).append(AdapterPart(self._strengths[name], **parts))
        for module, layer in self._model.named_modules():
            if module in layers:
                attach(layer, layers[module], self._model.device)
            else:
                detach(layer)
        self._in_place.change(in_place, self._value, keep_originals)

    def _value(self, parameter: str, original: Tensor) -> Tensor:
        value = original.to(torch.float32)
        for name, file in self._files.items():
            for change in file.changes.get(parameter, ()):
                value = value + self._strengths[name] * change.delta(original)
        return value


def _number(strength: float) -> float:
    if not math.isfinite(strength):
        raise ValueError(f"Loras: strength must be a number, got {strength}")
    return float(strength)


def _is_plain(weight: Any) -> bool:
    return type(weight) is nn.Parameter and weight.dtype.is_floating_point and weight.dtype.itemsize >= 2
