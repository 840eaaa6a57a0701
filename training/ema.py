# SPDX-License-Identifier: Apache-2.0
"""Running averages of the weights, cut over the processes like the weights themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.parallel import local_tensor, reshard


class Ema:
    """Exponential moving averages in float32 of the parameters that train.

    Args:
        networks: sharded (see `training.parallel.shard`), or plain.
        decay: of the average per step; early steps use less, (1 + step) / (10 + step).
        names: parameters to average; default: those that require gradients now. A run of several stages names those of
            all of them, so that its checkpoints fit each other.
        storage: "cpu" keeps the averages on the host. None: where the parameters are.

    Raises:
        ValueError: decay is not in [0, 1), or a name that the networks do not have.
    """

    def __init__(
        self, networks: nn.Module, decay: float, names: Iterable[str] | None = None, storage: str | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"Ema: decay must be at least 0 and less than 1, got {decay}")
        reshard(networks)
        known = dict(networks.named_parameters())
        chosen = [n for n, p in known.items() if p.requires_grad] if names is None else list(names)
        strange = [name for name in chosen if name not in known]
        if strange:
            raise ValueError(f"Ema: names must be those of parameters, got {strange[0]!r}")
        self.decay = decay
        self._networks = networks
        self._parameters = {name: known[name] for name in chosen}
        self._averages = {
            name: parameter.detach().to(device=storage, dtype=torch.float32, copy=True)
            for name, parameter in self._parameters.items()
        }
        self._swapped = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters, after `step` (0, 1, ...) of the optimiser."""
        if self._swapped:
            raise RuntimeError("Ema: the averages are in the networks; nothing to learn from there")
        keep = min(self.decay, (1 + step) / (10 + step))
        averages = [local_tensor(average) for average in self._averages.values()]
        now = [local_tensor(p).to(a) for p, a in zip(self._parameters.values(), averages, strict=True)]
        if averages:
            torch._foreach_lerp_(averages, now, 1 - keep)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The networks with the averages in place of the parameters, which come back exactly, whatever happens.

        They wait beside the averages meanwhile: a further copy of what this process holds of them.
        """
        if self._swapped:
            raise RuntimeError("Ema: the averages are in the networks already")
        waiting = {
            name: local_tensor(p.detach()).to(device=local_tensor(self._averages[name]).device, copy=True)
            for name, p in self._parameters.items()
        }
        self._swapped = True
        try:
            self._put(self._averages)
            yield
        finally:
            self._put(waiting)
            self._swapped = False

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        reshard(self._networks)  # parameters that stay gathered after a forward would keep the old values
        for name, value in values.items():
            local_tensor(self._parameters[name].detach()).copy_(local_tensor(value))

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, sharded tensors; distributed checkpoints save and load them in place."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over averages of `state_dict`.

        Raises:
            ValueError: not the same parameters.
        """
        if state.keys() != self._averages.keys():
            other = sorted(state.keys() ^ self._averages.keys())
            raise ValueError(f"Ema: the state must have the parameters that are averaged, differs in {other[0]!r}")
        for name, value in state.items():
            average = self._averages[name]
            if average is not value:
                local_tensor(average).copy_(local_tensor(value))
