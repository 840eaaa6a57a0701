# SPDX-License-Identifier: Apache-2.0
"""Parallel training, whole: processes, the mesh they form, and what of the model each of them holds.

    mesh = start(config)               # joins the processes that torchrun started; alone it is a world of one
    shard(networks, mesh, config)      # parameters become shards: FSDP2, over several nodes HSDP
    load_weights(networks, folder)
    ...                                # loss.backward(); clip_gradients(networks, 1.0); optimizer.step()
    stop()

The processes form a mesh, replicate x shard x ring x ulysses, the last innermost: neighbours by NVLink do Ulysses'
all-to-all, far ones only average gradients. Processes that differ in `ring` or `ulysses` work on parts of the same
sequences (`ProcessMesh.context`), those that differ in `replicate` or `shard` on other ones (`ProcessMesh.data_rank`).
Parameters, gradients and optimiser states are cut over shard x ring x ulysses and copied along `replicate`.

Every process of a context-parallel group comes to the same loss, and FSDP2 averages gradients over all processes. So
the loss of a process is (sum over its samples) / (samples of all in the step) x (number of processes).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, debug

from talkingdit.checkpoints.fill import check_names
from talkingdit.checkpoints.weights import Weights, open_weights
from talkingdit.distributed.restart import arguments_of_restart
from talkingdit.errors import UserError
from talkingdit.nn.bfloat16 import multiplies_bfloat16
from talkingdit.nn.context_parallel import ContextParallel
from talkingdit.nn.units import modules_of
from training.activations import checkpoint_activations
from training.frozen import frozen_layers
from training.host import HOST
from training.networks import Networks
from training.sections import ParallelConfig

# FSDP2 warns of units that return views, lest somebody writes into those. Models here do so in inference only.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

AXES = ("replicate", "shard", "ring", "ulysses")


@dataclass(frozen=True)
class ProcessMesh:
    """Where this process stands among all."""

    axes: DeviceMesh  # AXES
    fsdp: DeviceMesh  # ("shard",) or, for HSDP, ("replicate", "shard"), where shard is shard x ring x ulysses
    device: torch.device
    rank: int
    world: int
    data_rank: int  # which share of the samples of a step this process works on ...
    data_size: int  # ... of how many
    context: ContextParallel | None  # whom it shares their sequences with, if anyone


def start(config: ParallelConfig, device: str = "auto") -> ProcessMesh:
    """Join the other processes and find the own place in the mesh.

    The process group is torchrun's; a process that was started alone makes one of its own, without a port. A group
    that exists already is used as it is.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is any. torchrun's LOCAL_RANK chooses the GPU.

    Raises:
        UserError: the axes do not multiply to the number of processes, or there is no such device.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    sizes = mesh_sizes(config, world)
    place = _device(device)
    patience = timedelta(seconds=config.timeout_seconds)
    if not dist.is_initialized():
        # Checkpoints and offloaded shards need collectives on the host, too.
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        more = arguments_of_restart(patience) if "WORLD_SIZE" in os.environ else alone
        dist.init_process_group(backend, timeout=patience, **more)
    _forget_meshes()
    axes = init_device_mesh(place.type, tuple(sizes.values()), mesh_dim_names=AXES)
    copies, parts = sizes["replicate"], world // sizes["replicate"]
    shape, names = ((copies, parts), ("replicate", "shard")) if copies > 1 else ((parts,), ("shard",))
    fsdp = init_device_mesh(place.type, shape, mesh_dim_names=names)
    peers = sizes["ring"] * sizes["ulysses"]
    context = ContextParallel.from_mesh(axes["ring", "ulysses"], config.ring_mode) if peers > 1 else None
    for group in (*axes.get_all_groups(), *fsdp.get_all_groups(), *([context.group] if context else [])):
        distributed_c10d._set_pg_timeout(patience, group)  # groups of a mesh do not inherit it
    rank = dist.get_rank()
    return ProcessMesh(axes, fsdp, place, rank, world, rank // peers, world // peers, context)


def stop() -> None:
    """Wait for the others and leave. Without this, a process that is done early may end those that are not."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _forget_meshes() -> None:
    """Clear what DTensor remembers of its ops.

    It takes meshes of equal shape for one, and so would go on with the communicators of an earlier group, now gone.
    """
    for part in ("", "_python", "_fast_path"):  # torch versions have one or the other
        getattr(debug, f"_clear{part}_sharding_prop_cache", lambda: None)()


_LEFT_OVER = ("shard", "replicate")  # axes that may take what the others leave


def mesh_sizes(config: ParallelConfig, world: int) -> dict[str, int]:
    """Size of each axis; `shard` or `replicate` of 0 takes what the others leave.

    Raises:
        UserError: a size out of range, two of 0, or a product that is not `world`.
    """
    sizes = {name: int(getattr(config, name)) for name in AXES}
    for name, size in sizes.items():
        least = 0 if name in _LEFT_OVER else 1
        if size < least:
            raise UserError(f"parallel.{name}: must be at least {least}, got {size}.")
    left = [name for name in _LEFT_OVER if sizes[name] == 0]
    if len(left) > 1:
        raise UserError("parallel.replicate, parallel.shard: one of them may be 0, what the others leave; got both.")
    for name in left:
        sizes[name] = max(1, world // math.prod(size for other, size in sizes.items() if other != name))
    if math.prod(sizes.values()) != world:
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"parallel: {product} must be the number of processes, {world}, which torchrun sets with --nnodes and "
            f"--nproc-per-node; got {math.prod(sizes.values())}."
        )
    return sizes


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return HOST
    if name != "cuda":
        raise UserError(f"device: must be 'auto', 'cpu' or 'cuda', got {name!r}.")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise UserError(
            f"device: process {number} of this machine needs a GPU of its own and there are {count}; start torchrun "
            "with --nproc-per-node no larger than that."
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


# ---- The model in shards ---------------------------------------------------------------------------------------------


def computes_in(precision: str, mesh: ProcessMesh) -> torch.dtype:
    """The dtype that units multiply in: "auto" is bfloat16 unless the processor of any process is slower in it.

    All processes call it together.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    slower = slow_in_bfloat16(mesh)
    if mesh.world > 1:
        found = torch.tensor(float(slower), device=mesh.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        slower = bool(found.item())
    return torch.float32 if slower else torch.bfloat16


def slow_in_bfloat16(mesh: ProcessMesh) -> bool:
    """Is this process on a processor that multiplies float32 faster?"""
    return mesh.device.type == "cpu" and not multiplies_bfloat16(mesh.device)


def shard(networks: Networks, mesh: ProcessMesh, config: ParallelConfig, narrow: bool = False) -> None:
    """Cut all parameters over the processes, and prepare the model for training: nothing large stays whole.

    Each block and each other large layer is a unit of its own, which is gathered for its forward and for its backward
    and else exists in shards only; where nothing is cut, on processors, all are one unit. Where units compute in
    bfloat16 (`computes_in`) shards are float32 and gradients are summed in it; layers that must be float32 stay so.
    Parameters with values are first made those of rank 0; those on the meta device get memory for their shards, and
    are NaN until `load_weights`. Frozen parameters may have any dtype, those that train must share one.

    Args:
        narrow: some frozen parameters have another dtype than they compute in, see `training.frozen`.

    Raises:
        UserError: heads that ulysses does not divide.
    """
    model = networks.transformer
    heads = networks.family.cost.heads(model.config)
    if heads % config.ulysses:
        raise UserError(
            f"parallel.ulysses: must divide the {heads} heads of the model, got {config.ulysses}; the ring axis takes "
            "the rest."
        )
    # Nothing is done in place to what a unit returns; the warning would come for every unit.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    checkpoint_activations(model, _repeated_blocks(model), config)
    if config.compile:
        # The forward alone: hooks that gather and free parameters run around it, outside of the compiled code.
        for block in _repeated_blocks(model):
            block.forward = torch.compile(block.forward)
    if mesh.world > 1:
        for tensor in (*networks.parameters(), *networks.buffers()):
            if not tensor.is_meta:
                dist.broadcast(tensor.detach(), 0)

    pinned = mesh.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pinned) if config.offload else OffloadPolicy()
    # Inputs are not cast at the border of a unit: the residual stream and timesteps are float32 and stay so.
    # Frozen weights may be stored in less than they compute in.
    precise = MixedPrecisionPolicy(torch.float32 if narrow else None, cast_forward_inputs=False)
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh.fsdp, "offload_policy": offload}
    units = networks.family.units
    usual = mixed if computes_in(config.precision, mesh) == torch.bfloat16 else precise
    # On processors that share nothing but gradients units save no memory, nor would one be on its way while another
    # computes; they cost a cast of their own each, and a word with the other processes.
    apart = mesh.device != HOST or mesh.fsdp.size(mesh.fsdp.ndim - 1) > 1
    layers = [(layer, unit) for _, layer, unit in modules_of(model, units.UNITS)]
    for layer, unit in layers:
        policy = precise if unit.float32 else usual
        # What runs last in the forward runs first in the backward: the head stays gathered in between.
        if apart or policy is not usual:
            fully_shard(layer, mp_policy=policy, reshard_after_forward=layer is not layers[-1][0], **options)
    # The root keeps what is called more than once or not at all, as conditions come and go. It is small.
    fully_shard(model, mp_policy=usual, reshard_after_forward=False, **options)
    for name in getattr(model, "forward_methods", ()):  # called instead of its forward
        register_fsdp_forward_method(model, name)
    if networks.text_encoder is not None:
        fully_shard(networks.text_encoder, mp_policy=precise, reshard_after_forward=False, **options)
    in_order: list[Any] = [model.get_submodule(path) for path in units.walk(model.config)] if apart else []
    for layer, following in pairwise(in_order):  # backward prefetch, in reverse, is what FSDP2 does by itself
        layer.set_modules_to_forward_prefetch([following])

    home = HOST if config.offload else mesh.device
    networks._apply(lambda tensor: torch.full_like(tensor, torch.nan, device=home) if tensor.is_meta else tensor)


def sharded_modules(networks: nn.Module) -> Iterator[FSDPModule]:
    """Every unit, the roots among them."""
    return (module for module in networks.modules() if isinstance(module, FSDPModule))


def reshard(networks: nn.Module) -> None:
    """Drop every gathered parameter: what changes the shards from outside of training must not leave old ones."""
    for unit in sharded_modules(networks):
        unit.reshard()


def trainable_changed(networks: nn.Module) -> None:
    """To be called after `requires_grad` of parameters changed in sharded networks, as a new stage does."""
    for unit in sharded_modules(networks):
        unit.unshard()  # looks at the parameters anew: which train, in which dtype their gradients are summed
        unit.reshard()


def last_micro_batch(networks: nn.Module, last: bool) -> None:
    """Say before each backward whether the optimiser steps behind it: until then gradients stay within a replica.

    Without this all is right, too, only that replicas, which are far apart, talk for every micro-batch.
    """
    for unit in sharded_modules(networks):
        unit.set_requires_all_reduce(last, recurse=False)
        unit.set_is_last_backward(last)


def _repeated_blocks(model: nn.Module) -> list[Any]:
    """The blocks of a diffusers model, by the names of their classes."""
    names = getattr(model, "_repeated_blocks", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


# ---- Gradients -------------------------------------------------------------------------------------------------------


def clip_gradients(networks: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their common norm, over all processes, is at most `max_norm`; the norm before."""
    parameters = [parameter for parameter in networks.parameters() if parameter.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(isinstance(g, DTensor) and g.device_mesh.size(g.device_mesh.ndim - 1) > 1 for g in gradients):
        # Every process has all of them: no need to ask for every call how tensors are cut.
        whole = [local_tensor(gradient) for gradient in gradients]
        norm = torch.nn.utils.get_total_norm(whole)
        torch._foreach_mul_(whole, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.item()
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


# ---- Weights ---------------------------------------------------------------------------------------------------------


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; it shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor, like: DTensor) -> Tensor:
    """The rows of a whole tensor that this process holds of the sharded tensor `like`; a view."""
    mesh = like.device_mesh
    rows, parts = tensor.shape[0], mesh.size(mesh.ndim - 1)
    begin = min(rows, mesh.get_local_rank(mesh.ndim - 1) * -(-rows // parts))
    return tensor.narrow(0, begin, like.to_local().shape[0])


def load_weights(networks: Networks, folder: Path) -> None:
    """Fill sharded networks from a checkpoint: every process reads its own rows, none ever holds the whole.

    Args:
        folder: of any kind that `talkingdit.models.load` takes. Where the networks have a text encoder it is read from
            text_encoder/ beside transformer/. Adapters (LoRA) of the networks are left as they are.

    Raises:
        UserError: weights that are missing, left over or of another shape, or a damaged file.
    """
    reshard(networks)
    _fill(networks.transformer, networks.family.train.open_weights(folder))
    if networks.text_encoder is not None:
        _fill(networks.text_encoder, open_weights(folder / "text_encoder"))
    dist.barrier()


@torch.no_grad()
def _fill(module: nn.Module, weights: Weights) -> None:
    # PEFT moves an adapted layer into `base_layer` and puts its own parameters beside it.
    own = {name.replace(".base_layer.", "."): p for name, p in module.named_parameters() if ".lora_" not in name}
    eight_bits = frozen_layers(module)
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    shapes |= {name: (layer.out_features, layer.in_features) for name, layer in eight_bits.items()}
    check_names(shapes, weights.shapes, weights.source, type(module).__name__)
    for name, tensor in weights.stream():  # mapped files: only the rows that are looked at are read
        if name in eight_bits:
            eight_bits[name].fill(tensor)
            continue
        parameter: Any = own[name]
        parameter.to_local().copy_(local_part(tensor, parameter))
