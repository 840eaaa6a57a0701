# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds of networks and optimisers, by the names of parameters and so independent of the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.checkpoint import CheckpointError, PreparedState
from training.parallel import local_tensor

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # of activation checkpointing and of torch.compile


class ModelState:
    """Parameters and persistent buffers of sharded networks, for Checkpoints: read and written in place.

    Args:
        select: which names a checkpoint holds; all by default. With adapters on a large frozen model, those that train.
    """

    def __init__(self, networks: nn.Module, select: Callable[[str], bool] | None = None) -> None:
        self._networks, self._select = networks, select

    def state_dict(self) -> dict[str, Any]:
        named = tensors_of(self._networks)
        return {name: tensor for name, tensor in named.items() if self._select is None or self._select(name)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is left to do: the tensors of `state_dict()` are the networks' own."""


class OptimizerState(PreparedState):
    """States of several optimisers, each by the name of its parameter.

    Parameters without a state (frozen, or not yet stepped) have none in the checkpoint, and none after a load. torch's
    own `get_optimizer_state_dict` instead steps a fresh optimiser once and so moves its step count. Settings such as
    learning rates and weight decay are the configuration's; what an optimiser itself advances in its groups is kept.

    Args:
        optimizers: just built, before a learning-rate schedule or a step touched them.
    """

    def __init__(self, networks: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._names = {parameter: name for name, parameter in _cleaned(networks.named_parameters()).items()}
        self._built = [[_settings(group) for group in optimizer.param_groups] for optimizer in self._optimizers]

    def state_dict(self) -> dict[str, Any]:
        states: dict[str, Any] = {}
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                if state:
                    states[self._name(parameter)] = {key: _portable(value) for key, value in state.items()}
        return {"states": states, "groups": self._advanced()}

    def prepare(self, saved: set[str]) -> None:
        """Lets the optimisers make the states that the checkpoint holds, and drops those that it does not hold.

        Raises:
            CheckpointError: the checkpoint holds the state of a parameter that no optimiser trains.
        """
        wanted = {name.split("/")[1] for name in saved if name.startswith("states/")}
        trained = {
            self._name(parameter)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        if strange := sorted(wanted - trained):
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise CheckpointError(f"checkpoint: it holds the optimiser's state of {strange[0]}{more}, not trained here")
        for optimizer in self._optimizers:
            for parameter in [p for p in optimizer.state if self._name(p) not in wanted]:
                del optimizer.state[parameter]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            _make_states(optimizer, [p for p in parameters if self._name(p) in wanted and not optimizer.state.get(p)])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state_dict["states"].get(self._name(parameter), {}).items():
                    if not isinstance(value, Tensor):
                        state[key] = value
                    elif value is not state[key]:
                        local_tensor(state[key]).copy_(local_tensor(value))
        for index, groups in state_dict["groups"].items():
            for position, settings in groups.items():
                self._optimizers[index].param_groups[position].update(settings)

    def _name(self, parameter: Tensor) -> str:
        name = self._names.get(parameter)
        if name is None:
            raise ValueError(
                f"checkpoint: an optimiser holds a parameter of shape {list(parameter.shape)} of no network"
            )
        return str(name)

    def _advanced(self) -> dict[int, dict[int, dict[str, Any]]]:
        """Settings of groups that changed since the optimisers were built, other than learning rates."""
        changed: dict[int, dict[int, dict[str, Any]]] = {}
        for index, optimizer in enumerate(self._optimizers):
            for position, group in enumerate(optimizer.param_groups):
                built = self._built[index][position]
                different = {key: value for key, value in _settings(group).items() if value != built.get(key)}
                if different:
                    changed.setdefault(index, {})[position] = different
        return changed


def tensors_of(networks: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their plain names, not copied: sharded ones are DTensors."""
    return _cleaned((name, value) for name, value in networks.state_dict().items() if isinstance(value, Tensor))


@torch.no_grad()
def gather_state(networks: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Whole tensors on the host in rank 0, for export; an empty dictionary in the other ranks.

    A collective call. One tensor at a time is whole on the device, so the host of rank 0 needs room for one copy of the
    networks, the devices for their largest tensor.

    Args:
        dtype: for floating-point tensors; as they are by default.
    """
    whole: dict[str, Tensor] = {}
    keep = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for name, tensor in tensors_of(networks).items():
        if isinstance(tensor, DTensor):  # offloaded shards lie on the host; collectives are the device's
            tensor = cast(DTensor, tensor.to(tensor.device_mesh.device_type)).full_tensor()
        if keep:
            target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            whole[name] = tensor.detach().to("cpu", target, copy=True).contiguous()
    return whole


def _cleaned(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for name, value in named:
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        result[name] = value
    return result


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "lr") and not isinstance(value, Tensor)}


def _make_states(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """A step of these parameters alone, with zero gradients and learning rate: only the optimiser knows its states."""
    if not parameters:
        return
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:  # some optimisers insist on a tensor
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, old in zip(optimizer.param_groups, before, strict=True):
        group.clear()
        group.update(old)


def _portable(value: Any) -> Any:
    """The value as DCP can cut it anew for any layout.

    torchao's quantised states have a scale per block of 256 or so consecutive numbers. Rows of whole blocks are saved
    as they are; where a block crosses rows (vectors, odd shapes) a new layout would cut it, so these few are saved in
    float32, and quantised again when they are loaded.
    """
    if not isinstance(value, Tensor):
        return value
    local = local_tensor(value)
    block = getattr(local, "block_size", None)
    if block is None or not hasattr(local, "dequantize") or (value.ndim > 1 and value.shape[1:].numel() % block == 0):
        return value
    plain = local.dequantize()
    if not isinstance(value, DTensor):
        return plain
    return DTensor.from_local(
        plain, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
