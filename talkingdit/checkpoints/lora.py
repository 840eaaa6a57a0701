# SPDX-License-Identifier: Apache-2.0
"""LoRA files on a model: beside the weights as adapters, or merged into them, and off again without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from talkingdit.checkpoints.lora_files import LoraFile, read_lora
from talkingdit.errors import UserError


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA file did to a model."""

    name: str
    adapted: int  # modules that got an adapter
    changed: int  # parameters whose values change themselves (norms, biases, convolutions)
    ignored: tuple[str, ...]  # keys for the image branch of I2V models

    def __str__(self) -> str:
        rest = f", {len(self.ignored)} parts for an image branch left aside" if self.ignored else ""
        return f"{self.name}: {self.adapted} layers adapted, {self.changed} parameters changed{rest}"


class Loras:
    """The LoRA files of one model.

    Linear layers get adapters (PEFT), so that the weights may be quantised or sharded and strengths change at once.
    What has no adapter - norms, biases, convolutions, whole-weight differences - is changed in place, and the original
    values are kept on the CPU. `merge` does the same with every layer, which is faster to run and takes a copy of the
    changed weights in host memory, unless it is told not to keep one. Whatever is unloaded leaves the weights bit for
    bit as they were.

    Args:
        model: a diffusers model with native names, `WanS2VModel`. There must be one `Loras` for a model at most.
    """

    def __init__(self, model: Any):
        if getattr(model, "peft_config", None):
            raise ValueError("Loras: the model has adapters already; remove them first (unload_lora)")
        self._model = model
        self._files: dict[str, LoraFile] = {}
        self._strengths: dict[str, float] = {}
        self._originals: dict[str, Tensor] = {}
        self._merged = False
        self._final = False  # merged without originals to go back to

    @property
    def strengths(self) -> dict[str, float]:
        """Strength of each file by name."""
        return dict(self._strengths)

    @property
    def merged(self) -> bool:
        return self._merged

    def load(self, source: str | Path, name: str | None = None, strength: float = 1.0) -> LoraReport:
        """Add a file.

        Args:
            source: see `read_lora`.
            name: for later calls; default: the file name without its ending.
            strength: factor of all its changes; 0 is none.

        Raises:
            UserError: see `read_lora`; the model is then as it was.
            ValueError: the name is taken.
        """
        name = Path(source).stem.replace(".", "_") if name is None else name
        if not name or "." in name:
            raise ValueError(f"Loras: name must not be empty or have a dot, got {name!r}")
        if name in self._files:
            raise ValueError(f"Loras: there is a LoRA {name!r} already; unload it or choose another name")
        self._check_open()
        file = read_lora(source, self._model)
        self._files[name], self._strengths[name] = file, float(strength)
        if not self._merged:
            self._attach(name)
        self._apply()
        adapters = sum(self._has_adapter(module) for module in file.low_rank)
        return LoraReport(name, adapters, len(file.low_rank) - adapters + len(file.diffs), file.ignored)

    def set_strength(self, name: str, strength: float) -> None:
        """Change the strength of one file.

        Raises:
            ValueError: there is no file of this name.
        """
        self._known(name)
        self._check_open()
        self._strengths[name] = float(strength)
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
                for module in file.low_rank:
                    if not _is_plain(self._layer(module).weight):
                        raise UserError(f"{module}: a LoRA cannot be merged into quantised weights; use it unmerged.")
            self._detach()
            self._merged = True
            self._apply()
        if not keep_originals:
            self._originals.clear()
            self._final = True

    def unmerge(self) -> None:
        """Back to adapters; the weights are again what they were."""
        self._check_open()
        if self._merged:
            self._merged = False
            self._apply()
            for name in self._files:
                self._attach(name)
            self._apply()

    def unload(self, name: str | None = None) -> None:
        """Take one file, or all, off the model again.

        Raises:
            ValueError: there is no file of this name.
        """
        names = list(self._files) if name is None else [self._known(name)]
        self._check_open()
        if not self._merged:
            self._detach()
        for gone in names:
            del self._files[gone], self._strengths[gone]
        if not self._merged:
            for kept in self._files:
                self._attach(kept)
        self._apply()

    def _known(self, name: str) -> str:
        if name not in self._files:
            raise ValueError(f"Loras: there is no LoRA {name!r}, only {', '.join(self._files) or 'none'}")
        return name

    def _check_open(self) -> None:
        if self._final:
            raise UserError("LoRAs were merged without keeping the original weights; load the model again.")

    def _layer(self, module: str) -> Any:
        layer = self._model.get_submodule(module)
        base = getattr(layer, "base_layer", None)
        return base if isinstance(base, nn.Module) else layer

    def _has_adapter(self, module: str) -> bool:
        return not self._merged and isinstance(self._layer(module), nn.Linear)

    def _attach(self, name: str) -> None:
        """Adapters for the linear layers of a file."""
        state: dict[str, Tensor] = {}
        for module, part in self._files[name].low_rank.items():
            if self._has_adapter(module):
                state[f"{module}.lora_A.weight"] = part.down
                state[f"{module}.lora_B.weight"] = (part.up.float() * part.scale).to(part.up.dtype)
        if state:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several files are fine
                self._model.load_lora_adapter(state, prefix=None, adapter_name=name)

    def _detach(self) -> None:
        """No adapters on any layer."""
        if getattr(self._model, "peft_config", None):
            self._model.unload_lora()

    def _apply(self) -> None:
        """Strengths to adapters, and changed parameters from their originals."""
        from diffusers.utils.peft_utils import set_weights_and_activate_adapters

        attached = [name for name in self._files if name in (getattr(self._model, "peft_config", None) or {})]
        if attached:
            set_weights_and_activate_adapters(self._model, attached, [self._strengths[name] for name in attached])
        changes = {parameter: self._parameter(parameter) for parameter in self._changed()}
        with torch.no_grad():
            for name in [name for name in self._originals if name not in changes]:
                self._parameter(name).copy_(self._originals.pop(name))
            for name, parameter in changes.items():
                if name not in self._originals:
                    self._originals[name] = parameter.detach().to("cpu", copy=True)
                value = self._originals[name].to(parameter.device, torch.float32)
                for delta in self._deltas(name, parameter):
                    value = value + delta
                parameter.copy_(value)

    def _parameter(self, name: str) -> nn.Parameter:
        module, _, leaf = name.rpartition(".")
        return getattr(self._layer(module), leaf)

    def _changed(self) -> list[str]:
        """Parameters that do not have their original values."""
        names: dict[str, None] = {}
        for file in self._files.values():
            names |= dict.fromkeys(f"{module}.weight" for module in file.low_rank if not self._has_adapter(module))
            names |= dict.fromkeys(file.diffs)
        return list(names)

    def _deltas(self, name: str, parameter: Tensor) -> Iterator[Tensor]:
        module, _, leaf = name.rpartition(".")
        for key, file in self._files.items():
            if leaf == "weight" and module in file.low_rank and not self._has_adapter(module):
                yield self._strengths[key] * file.low_rank[module].delta(parameter)
            if name in file.diffs:
                yield self._strengths[key] * file.diffs[name].to(parameter.device, torch.float32)


def _is_plain(weight: Any) -> bool:
    return type(weight) is nn.Parameter and weight.dtype.is_floating_point and weight.dtype.itemsize >= 2
