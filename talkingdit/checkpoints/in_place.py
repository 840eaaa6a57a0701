# SPDX-License-Identifier: Apache-2.0
"""Weights of a model changed in place, wherever they wait between two uses, and brought back bit for bit.

A parameter is not always what the model computes with: offloading keeps it elsewhere and lets the parameter be an empty
or an old tensor until its layer runs.

    resident                   the parameter itself
    host memory                the parameter, and with streams a copy in host memory that comes back after every use
    disk (diffusers)           a file per group of layers; a changed group gets a file of its own in a folder beside the
                               first one, which stays as it is, for diffusers takes it up again in later runs. The
                               folder goes with the model; that of a killed process goes with the next change
    host memory (accelerate)   a dictionary of tensors; parameters are on meta
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from talkingdit.atomic import part_folder
from talkingdit.checkpoints.saving import save_tensors
from talkingdit.errors import UserError

Value = Callable[[str, Tensor], Tensor]  # a parameter's name and original value -> its new value


class InPlace:
    """The parameters of a model that do not have their original values.

    Args:
        model: of which parameters are changed. There must be one of these for a model at most.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._originals: dict[str, Tensor] = {}  # kept copies, on the CPU
        self._redirected: dict[Any, str] = {}  # groups on disk that have a changed file, and the path of the first one
        self._rooms: dict[Path, Path] = {}  # folders of such files, and ours in them
        self._open = contextlib.ExitStack()  # keeps ours from being taken for leftovers
        self._for_good = False  # files in them are what the model is now
        weakref.finalize(model, self._open.close)

    def change(self, names: Iterable[str], value: Value, keep: bool = True) -> None:
        """Give these parameters new values, and all others their original ones.

        Args:
            names: of parameters.
            value: called with a name and the original value, on the device that has it; any floating dtype.
            keep: copies of original values that are not kept yet; without them, `forget` must follow.

        Raises:
            UserError: the weights wait where they cannot be changed, or the disk is full.
        """
        wanted = dict.fromkeys(names)
        on_disk: dict[Any, list[str]] = {}
        homes = _Homes(self._model)
        with torch.no_grad():
            for name in dict.fromkeys((*self._originals, *wanted)):
                group = homes.group_on_disk(name)
                if group is not None:
                    on_disk.setdefault(group, []).append(name)
                elif name in wanted:
                    original = self._originals.get(name, homes.read(name).detach())
                    if keep and name not in self._originals:
                        self._originals[name] = original.to("cpu", copy=True)
                    homes.write(name, value(name, original.to(homes.device(name))))
                else:
                    homes.write(name, self._originals.pop(name))
            for group in [group for group in self._redirected if group not in on_disk]:
                self._restore(group)
            for group, changed in on_disk.items():
                self._rewrite(group, changed, lambda n, old: value(n, old) if n in wanted else old, homes)

    def original(self, name: str) -> Tensor:
        """The original value of a parameter, where it lies."""
        if name in self._originals:
            return self._originals[name]
        homes = _Homes(self._model)
        group = homes.group_on_disk(name)
        if group is None:
            return homes.read(name).detach()
        first = self._redirected.get(group, group.safetensors_file_path)
        return _load(first)[group.tensor_to_key[homes.parameter(name)]]

    def forget(self) -> None:
        """Keep no originals: the parameters stay what they are now."""
        self._originals.clear()
        self._for_good |= bool(self._redirected)
        for group in self._redirected:
            self._redirected[group] = group.safetensors_file_path

    def _rewrite(self, group: Any, names: list[str], value: Value, homes: _Homes) -> None:
        """A file of its own for a changed group."""
        first = Path(self._redirected.get(group, group.safetensors_file_path))
        tensors = _load(first)
        for name in names:
            parameter = homes.parameter(name)
            key = group.tensor_to_key[parameter]
            # Where the group went to disk already changed, its file does not have the original.
            original = self._originals.get(name, tensors[key])
            tensors[key] = value(name, original).to(tensors[key].dtype)
            parameter.data.copy_(tensors[key])
        try:
            changed = self._room(first.parent) / first.name
            save_tensors(tensors, changed)
        except OSError as error:
            raise UserError(f"{first.parent}: the changed weights cannot be written there ({error}).") from error
        self._redirected.setdefault(group, str(first))
        group.safetensors_file_path = str(changed)

    def _room(self, folder: Path) -> Path:
        """A folder of ours in a folder of diffusers' files."""
        if folder not in self._rooms:
            self._rooms[folder] = self._open.enter_context(part_folder(folder / "changed"))
        return self._rooms[folder]

    def _restore(self, group: Any) -> None:
        """The first file of a group again."""
        changed, group.safetensors_file_path = group.safetensors_file_path, self._redirected.pop(group)
        for key, tensor in _load(group.safetensors_file_path).items():
            group.key_to_tensor[key].data.copy_(tensor)
        Path(changed).unlink(missing_ok=True)
        if not self._redirected and not self._for_good:
            self._rooms.clear()
            self._open.close()


class _Homes:
    """Where the parameters of a model are at the moment."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._groups = {id(tensor): group for group in _groups(model) for tensor in _tensors_of(group)}

    def parameter(self, name: str) -> nn.Parameter:
        return self._model.get_parameter(name)

    def group_on_disk(self, name: str) -> Any | None:
        """The group of diffusers' offloading whose file has the parameter."""
        group = self._groups.get(id(self.parameter(name)))
        return group if group is not None and group.offload_to_disk_path is not None else None

    def device(self, name: str) -> torch.device:
        """That has the parameter now."""
        parameter = self.parameter(name)
        return torch.device("cpu") if parameter.is_meta else parameter.device

    def read(self, name: str) -> Tensor:
        parameter = self.parameter(name)
        return self._in_accelerate(name) if parameter.is_meta else parameter.data

    def write(self, name: str, value: Tensor) -> None:
        parameter = self.parameter(name)
        if parameter.is_meta:
            self._in_accelerate(name).copy_(value)
            return
        parameter.data.copy_(value)
        group = self._groups.get(id(parameter))
        kept = None if group is None else group.cpu_param_dict.get(parameter)
        if kept is not None and kept.data_ptr() != parameter.data_ptr():
            kept.copy_(value)

    def _in_accelerate(self, name: str) -> Tensor:
        """The tensor in host memory that accelerate's hook brings in for a parameter on meta."""
        module, _, leaf = name.rpartition(".")
        hook: Any = getattr(self._model.get_submodule(module), "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        maps = [one.weights_map for one in hooks if getattr(one, "weights_map", None) is not None]
        for weights in maps:
            source = getattr(weights, "dataset", weights)
            prefix = getattr(weights, "prefix", "")
            if isinstance(source, dict) and prefix + leaf in source:
                tensor: Tensor = source[prefix + leaf]
                return tensor
        raise UserError(
            f"{name}: its weights wait on disk or nowhere, where a LoRA cannot change them; load LoRAs before "
            "accelerate's offloading is set up."
        )


def _groups(model: nn.Module) -> Iterator[Any]:
    """The groups of diffusers' group offloading, each once."""
    seen = set()
    for module in model.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None and id(hook.group) not in seen:
            seen.add(id(hook.group))
            yield hook.group


def _tensors_of(group: Any) -> Iterator[Tensor]:
    for module in group.modules:
        yield from module.parameters()
    yield from group.parameters


def _load(path: str | Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
