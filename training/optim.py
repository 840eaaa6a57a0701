# SPDX-License-Identifier: Apache-2.0
"""Optimisers on sharded parameters, and the learning rate over a stage."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from talkingdit.errors import UserError
from talkingdit.nn.bfloat16 import multiplies_bfloat16
from talkingdit.nn.units import large_prefixes
from training.networks import Networks
from training.parallel import local_tensor
from training.sections import OptimConfig
from training.stages import TRANSFORMER, matches, plain_name


def build_optimizers(networks: Networks, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Optimisers of all parameters that require gradients, each parameter in one of them.

    Args:
        config: `name` chooses "adamw"; "adamw8bit" (torchao: moments in 8 bits); "muon" for the matrices inside large
            units (blocks, audio injectors) with AdamW for everything else (all, if `muon_lr` is 0; adapters always);
            or any "module.Class", which is given lr and `options`, and betas, eps and weight_decay if it takes them.
            `decay` says of which parameters weight decay makes smaller ones.

    Raises:
        UserError: an optimiser that is not there or does not take its options, or nothing to train.
    """
    named = {name: parameter for name, parameter in networks.named_parameters() if parameter.requires_grad}
    if not named:
        raise UserError("optim: no parameter of the networks requires a gradient; check `train` and `freeze`.")
    matrices: dict[str, nn.Parameter] = {}
    if config.name == "muon" and config.muon_lr > 0:
        inner = tuple(TRANSFORMER + prefix for prefix in large_prefixes(networks.family.units.UNITS))
        matrices = {
            name: p for name, p in named.items() if p.ndim == 2 and name.startswith(inner) and ".lora_" not in name
        }
    others = {name: p for name, p in named.items() if name not in matrices}
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        make, arguments = _kind(config)
        try:
            groups = _groups(others, config.lr, config, decaying(networks, config))
            optimizers.append(make(groups, lr=config.lr, **arguments))
        except TypeError as error:
            raise UserError(f"optim.options: {config.name} does not take them ({error}).") from error
    if matrices:
        groups = _groups(matrices, config.muon_lr, config, set(matrices))
        optimizers.append(Muon(groups, weight_decay=config.weight_decay))
    return optimizers


# What a matrix or a filter multiplies can be made smaller everywhere; a bias, the gain of a norm, a modulation or an
# embedding says how large something is, and pulling it to zero changes that.
_DECAYING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def decaying(networks: nn.Module, config: OptimConfig) -> set[str]:
    """Names of the parameters that weight decay works on: weights of linear layers (adapters among them) and
    convolutions, or with `decay` = "all" everything."""
    if config.decay == "all":
        return {name for name, _ in networks.named_parameters()}
    found = set()
    for path, module in networks.named_modules():
        if isinstance(module, _DECAYING):
            found.add(f"{path}.weight" if path else "weight")
    return found


def _groups(
    named: dict[str, nn.Parameter], lr: float, config: OptimConfig, decays: Container[str]
) -> list[dict[str, Any]]:
    """Parameter groups by learning rate and decay; of the patterns in `lr_scale` that fit a name the first holds.

    Without weight decay, or where an optimiser of the user's has none, nothing is said of it.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        scale = next(
            (factor for pattern, factor in config.lr_scale.items() if matches(plain_name(name), [pattern])), 1.0
        )
        spared = config.weight_decay > 0 and name not in decays
        groups.setdefault((lr * scale, spared), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, **({"weight_decay": 0.0} if spared else {})}
        for (rate, spared), parameters in groups.items()
    ]


def _kind(config: OptimConfig) -> tuple[Any, dict[str, Any]]:
    """Class of the optimiser of everything but Muon's matrices, and its arguments besides parameters and lr."""
    common = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name in ("adamw", "muon"):
        return _AdamW, common | {"fused": True} | config.options
    if config.name == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise UserError(f"optim.name: adamw8bit needs torchao, `pip install torchao` ({error}).") from error
        return AdamW8bit, common | config.options
    module, _, name = config.name.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            "optim.name: must be adamw, adamw8bit, muon or the dotted name of a class that can be imported, "
            f"got {config.name!r} ({error})."
        ) from error
    taken = inspect.signature(make).parameters
    return make, {key: value for key, value in common.items() if key in taken} | config.options


class _AdamW(torch.optim.AdamW):
    """AdamW that works on what this process holds, as all of it is elementwise: nobody asks how tensors are cut."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        complex_numbers = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local_tensor, tensors)
        return bool(complex_numbers)


# ---- Learning rate ---------------------------------------------------------------------------------------------------


def learning_rate_factor(config: OptimConfig, step: int, progress: float) -> float:
    """Factor of all learning rates: linear warmup, then constant, or cosine or linear down to `final`.

    Args:
        step: steps of the stage that are done.
        progress: share of the stage that is done, 0..1.
    """
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}
    return warmup * (config.final + (1 - config.final) * left[config.schedule])


class LearningRate:
    """Learning rates of optimisers over a stage.

    It takes their full rates when it is made, so it must be made before their states are loaded: a resumed run then
    follows its configuration and not that of the run that it resumes.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], config: OptimConfig) -> None:
        self._config = config
        self._full = [(optimizer, [float(g["lr"]) for g in optimizer.param_groups]) for optimizer in optimizers]

    def set(self, step: int, progress: float) -> float:
        """Set them for the coming step; returns their common factor. Arguments as of `learning_rate_factor`."""
        factor = learning_rate_factor(self._config, step, progress)
        for optimizer, rates in self._full:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):  # torchao compiles its step, with the rate as an input
                    group["lr"].fill_(rate * factor)
                else:
                    group["lr"] = rate * factor
        return factor


# ---- Muon ------------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Muon for matrices that may be sharded over their rows (Jordan et al. 2024; scaled as in arXiv:2502.16982).

    The momentum of a matrix is replaced by its nearest semi-orthogonal matrix, to which a few Newton-Schulz iterations
    come close enough. That needs the whole matrix: of every so many matrices each process of a shard group collects
    one, does the iterations and sends the rows back, so each matrix is worked on once and crosses the network twice.
    Small matrices travel together, and those of a shape are one batch.

    Args:
        params: matrices, or groups of them.
        lr: comparable to AdamW's: updates are scaled to a root mean square of 0.2, AdamW's usual one.
        weight_decay: decoupled, times lr.
        momentum: of the running mean of gradients, with Nesterov's look ahead.
        ns_steps: iterations.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(
        self, params: Any, lr: float = 2e-3, weight_decay: float = 0.01, momentum: float = 0.95, ns_steps: int = 4
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon: parameters must be matrices, got one of shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            # Largest first: matrices that are worked on at the same time are then of about the same size.
            parameters.sort(key=lambda parameter: parameter.numel(), reverse=True)
            if not parameters:
                continue
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [local_tensor(parameter.grad) for parameter in parameters]
            means = [local_tensor(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
            torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, means, group["momentum"])
            torch._foreach_mul_(
                [local_tensor(parameter) for parameter in parameters], 1 - group["lr"] * group["weight_decay"]
            )
            for parameter, update in zip(parameters, _orthogonal(parameters, updates, group["ns_steps"]), strict=True):
                scale = 0.2 * math.sqrt(max(parameter.shape))
                mine = local_tensor(parameter)
                mine.add_(update.to(mine.device, mine.dtype), alpha=-group["lr"] * scale)
        return loss


_TOGETHER = 1 << 22  # elements of small matrices that a process works on at once


def _orthogonal(parameters: Sequence[Tensor], updates: Sequence[Tensor], steps: int) -> Iterable[Tensor]:
    """The own rows of the orthogonalised updates, of which the own rows are given."""
    first = parameters[0]
    if not isinstance(first, DTensor) or first.device_mesh.size(first.device_mesh.ndim - 1) == 1:
        for begin, end in _portions(parameters, 1):
            yield from _newton_schulz_each(updates[begin:end], steps)
        return
    mesh = first.device_mesh
    for begin, end in _portions(parameters, mesh.size(mesh.ndim - 1)):
        # Offloaded ones go to the card, the others stay on theirs.
        given = updates[begin:end]
        mine = [update if update.device.type == mesh.device_type else update.to(mesh.device_type) for update in given]
        yield from _exchanged(parameters[begin:end], mine, steps, mesh.get_group(mesh.ndim - 1))


def _portions(parameters: Sequence[Tensor], size: int) -> Iterable[tuple[int, int]]:
    """Ranges of matrices that are worked on together: so many, or as many more as are small for each process."""
    begin = 0
    while begin < len(parameters):
        each = max(1, _TOGETHER // max(1, parameters[begin].numel()))
        yield begin, min(begin + each * size, len(parameters))
        begin += each * size


def _exchanged(parameters: Sequence[Tensor], mine: Sequence[Tensor], steps: int, group: Any) -> list[Tensor]:
    """As `_orthogonal`: process i of the group works on the matrices i, i + size, ... of these."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    owned = [range(process, len(mine), size) for process in range(size)]
    order = [index for indices in owned for index in indices]
    shapes = [parameters[index].shape for index in owned[rank]]
    # Rows are cut as torch.chunk cuts them.
    cuts = [[max(0, min(-(-n // size), n - i * -(-n // size))) for i in range(size)] for n, _ in shapes]
    sent = [sum(mine[index].numel() for index in indices) for indices in owned]
    got = [sum(cut[i] * columns for cut, (_, columns) in zip(cuts, shapes, strict=True)) for i in range(size)]
    rows = torch.cat([mine[index].flatten() for index in order])
    collected = rows.new_empty(sum(got))
    dist.all_to_all_single(collected, rows, got, sent, group)
    if len(shapes) == 1:
        whole = [collected.view(shapes[0])]  # no copy of what may be large
    else:
        pieces = [
            part.split([cut[i] * columns for cut, (_, columns) in zip(cuts, shapes, strict=True)])
            for i, part in enumerate(collected.split(got))
        ]
        whole = [torch.cat([piece[m] for piece in pieces]).view(shape) for m, shape in enumerate(shapes)]
    whole = [matrix.to(rows.dtype) for matrix in _newton_schulz_each(whole, steps)]
    if len(whole) == 1:
        collected = whole[0].flatten()
    elif whole:
        split = [matrix.split(cut) for matrix, cut in zip(whole, cuts, strict=True)]
        collected = torch.cat([cut[i].flatten() for i in range(size) for cut in split])
    dist.all_to_all_single(rows, collected, sent, got, group)
    back = dict(zip(order, rows.split([mine[index].numel() for index in order]), strict=True))
    return [back[index].view_as(update) for index, update in enumerate(mine)]


def _newton_schulz_each(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """`newton_schulz` of each matrix, of those of a shape at once."""
    found: dict[int, Tensor] = {}
    for shape in dict.fromkeys(matrix.shape for matrix in matrices):
        indices = [index for index, matrix in enumerate(matrices) if matrix.shape == shape]
        stacked = torch.stack([matrices[i] for i in indices]) if len(indices) > 1 else matrices[indices[0]][None]
        found |= zip(indices, newton_schulz(stacked, steps), strict=True)
    return [found[index] for index in range(len(matrices))]


def newton_schulz(
    matrices: Tensor, steps: int, coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
) -> Tensor:
    """Nearly the nearest semi-orthogonal matrix: singular values go to about 1 (0.7 to 1.2), singular vectors stay.

    In bfloat16, which the iterations bear, on GPUs and on processors that multiply it themselves, and are several times
    faster so; elsewhere in float32.

    Args:
        matrices: [..., rows, columns].
    """
    a, b, c = coefficients
    x = matrices.bfloat16() if multiplies_bfloat16(matrices.device) else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).view(-1, *x.shape[-2:])
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x.view(matrices.shape)
