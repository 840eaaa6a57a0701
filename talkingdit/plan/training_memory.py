# SPDX-License-Identifier: Apache-2.0
"""Memory of a training step per GPU: what is held between steps, and what the worst moment of a step adds.

It follows from what training/parallel.py does: parameters, gradients and optimiser states are cut over shard x ring x
ulysses ranks, tokens over ring x ulysses. Tests hold it against counts of the real program (docs/scaling.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from talkingdit.pipelines.memory import Memory
from talkingdit.plan.cards import COMMUNICATOR
from talkingdit.plan.cost import AUTOENCODER
from talkingdit.plan.run import INPUTS, MeshSizes, TrainingRun
from talkingdit.plan.transformer import Transformer
from talkingdit.plan.units import UnitSize, UnitSizes

MUON_TOGETHER = 1 << 22  # elements of small matrices that Muon works on at once
SIDE = ("gradients", "gathered")  # what is allocated in streams beside the main one


def states(sizes: UnitSizes, run: TrainingRun, ranks: int) -> dict[str, float]:
    """Bytes per GPU (or, offloaded, per GPU's part of the host) between steps, without gradients."""
    trained = sizes.total(ranks, trained=True) / ranks
    muon = sizes.matrices / ranks if run.optimizer == "muon" else 0.0
    eight = run.optimizer == "adamw8bit"
    return {
        "weights": sum(unit.stored(ranks, run.frozen) for unit in sizes.units.values()) + sizes.eight_bytes(False),
        "optimiser": _eight_bit_moments(sizes, ranks) if eight else 8 * (trained - muon) + 4 * muon,
        "averages": 4 * trained if run.averages else 0.0,
    }


def _eight_bit_moments(sizes: UnitSizes, ranks: int) -> float:
    """Bytes of torchao's: 8 bits per moment, a float32 scale for every 256 of them, and for every parameter a table of
    what 256 codes mean. Small and odd parameters have float32."""
    found = 0.0
    for unit in sizes.units.values():
        for shape, trains in unit.shapes:
            mine = -(-shape[0] // ranks) * math.prod(shape[1:]) if trains else 0
            found += 2 * (mine + mine / 64 + 1024) if mine >= 4096 and mine % 256 == 0 else 8 * mine
    return found


def memory(
    transformer: Transformer, sizes: UnitSizes, run: TrainingRun, mesh: MeshSizes, size: int = 2
) -> dict[str, float]:
    """Bytes per GPU at the worst moment, by what they are for; `size` is that of the compute dtype."""
    held = {} if run.offload else states(sizes, run, mesh.sharded)
    worst = max(moments(transformer, sizes, run, mesh, size), key=lambda moment: sum(moment.values()))
    activations = transformer.cost.activations(transformer.config, run, mesh, size)
    return {**held, **worst, "conditions": activations.conditions}


def moments(
    transformer: Transformer, sizes: UnitSizes, run: TrainingRun, mesh: MeshSizes, size: int = 2
) -> list[dict[str, float]]:
    """Bytes that come and go, at the backwards of the units of the walk and at the update; by what they are for."""
    activations = transformer.cost.activations(transformer.config, run, mesh, size)
    ranks = mesh.sharded
    gradient = {name: 4 * unit.elements(ranks, trained=True) / ranks for name, unit in sizes.units.items()}
    always = sum((4 if u.float32 else size) * u.elements(ranks) for u in sizes.units.values() if u.stays)
    several = run.per_rank(mesh) > 1  # gradients of earlier micro-batches are there already
    back = sizes.back
    width, away = INPUTS[run.inputs]
    waiting = {name: 0.0 if away else stream * width / 4 for name, stream in activations.streams.items()}
    # A matrix in eight bits is made wide in float32 and then narrower; where it waits on the host its codes come too.
    widened = (4 + size + (run.offload or run.swap > 0)) * sizes.largest_eight
    rounded = 0.0 if run.float8 == "off" else _rounded(*sizes.widest, transformer.tokens(run.clip)[1] / mesh.context)
    kept = sum(waiting[name] + activations.kept[name] for name in back)
    done = sum(gradient.values()) if several else sum(gradient[name] for name in sizes.last)
    # What the unit before this one is still reducing.
    before = sum(4.0 * sizes.units[name].elements(ranks, trained=True) for name in sizes.last)
    found = []
    for i in range(len(back) - 1, -1, -1):
        name, unit = back[i], sizes.units[back[i]]
        following = sizes.units[back[i - 1]] if i and ranks > 1 else UnitSize()
        first = size * max(unit.matrices, default=0)  # the first gradient, before it is part of what is reduced
        gathered = always + size * (unit.elements(ranks) + following.elements(ranks)) + before + first
        restored = activations.streams[name] if run.inputs != "float32" else 0.0  # from what waited
        # Rounding takes most as the block is made (again), whose backward has not begun.
        made = activations.again[name] + rounded if rounded else 0.0
        working = restored + max(activations.working[name], activations.multiplying[name] + widened, made)
        found.append({"gradients": done, "gathered": gathered, "kept": kept, "at work": working})
        kept -= waiting[name] + activations.kept[name]
        before = 4.0 * unit.elements(ranks, trained=True)
        done += 0.0 if several else gradient[name]
    found.append({"gradients": sum(gradient.values()), **({} if run.offload else _update(sizes, run, ranks))})
    return [{**moment, "gradients": 0.0} for moment in found] if run.offload else found


def _rounded(inputs: int, elements: int, tokens: float) -> float:
    """Bytes while torchao rounds what a layer multiplies to float8: both by way of two copies in float32, in turn."""
    rows = tokens * inputs
    return max(8 * rows, rows + 8 * elements)


def margins(mesh: MeshSizes, moments: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Bytes per GPU that no tensor takes but a card must have, by what they are for.

    Communicators: one for every axis over which ranks talk. Pools: PyTorch's allocator keeps what a stream has freed
    for that stream. Gathered parameters and reduced gradients are allocated in streams of their own, activations in
    the main one; what the forward has kept and the backward freed is thus not there for gradients. So each needs its
    own worst moment, and not only both together theirs. Short of memory the allocator gives unused blocks back and
    asks anew, which works, but stops the GPU every time.

    Args:
        moments: from `moments`.
    """
    axes = [mesh.replicate, mesh.sharded, mesh.context, mesh.ring if mesh.ulysses > 1 else 1]
    axes.append(mesh.ulysses if mesh.ring > 1 else 1)
    side = max(sum(moment.get(name, 0.0) for name in SIDE) for moment in moments)
    main = max(sum(value for name, value in moment.items() if name not in SIDE) for moment in moments)
    return {
        "communicators": COMMUNICATOR * sum(size > 1 for size in axes),
        "pools": side + main - max(sum(moment.values()) for moment in moments),
    }


def validation(
    transformer: Transformer, sizes: UnitSizes, run: TrainingRun, mesh: MeshSizes, size: int = 2
) -> dict[str, float]:
    """Bytes per GPU while the averages stand in for the weights, which wait beside them; by what they are for.

    A clip of the family's usual size is generated without gradients, one prediction after the other, and decoded.
    """
    ranks = mesh.sharded
    held = {} if run.offload else states(sizes, run, ranks)
    always = sum((4 if u.float32 else size) * u.elements(ranks) for u in sizes.units.values() if u.stays)
    largest = max((unit.elements(ranks) for unit in sizes.units.values() if not unit.stays), default=0)
    memory, cost, config = Memory(), transformer.cost, transformer.config
    clip = replace(cost.default_clip(config), branches=1, batched=False)
    parts = cost.frozen_parts(config, torch.float32)
    step = cost.step(config, clip, memory, size) / mesh.context + cost.conditions(config, clip, memory, size)
    return {
        **held,
        "weights that wait": 0.0 if run.offload or not run.averages else 4 * sizes.total(ranks, trained=True) / ranks,
        "gathered": always + 2 * size * largest,
        "generating": max(step, *cost.autoencoder(config, clip, memory, parts.width).values()),
        AUTOENCODER: parts.sizes.get(AUTOENCODER, 0),
    }


def host(
    transformer: Transformer, sizes: UnitSizes, run: TrainingRun, mesh: MeshSizes, size: int = 2
) -> dict[str, float]:
    """Bytes on the host per GPU, by what they are for.

    An asynchronous checkpoint is a copy of everything that it holds: of adapters' runs only what trains.
    """
    ranks = mesh.sharded
    held = states(sizes, run, ranks)
    trained = 4 * sizes.total(ranks, trained=True) / ranks
    saved = sum(held.values()) if run.trains != "lora" else trained + held["optimiser"] + held["averages"]
    found = {"shards, gradients, optimiser": sum(held.values()) + trained} if run.offload else {}
    if run.offload and run.validates and run.averages:
        found["weights that wait"] = trained
    if run.offload:
        found |= {name: value for name, value in _update(sizes, run, ranks).items() if value}
    if swapped := sizes.eight_bytes(True):
        found["swapped weights"] = swapped
    width, away = INPUTS[run.inputs]
    if away:
        activations = transformer.cost.activations(transformer.config, run, mesh, size)
        found["inputs of blocks"] = sum(activations.streams[name] for name in sizes.back) * width / 4
    return found | ({"copy of a checkpoint": saved} if run.asynchronous else {})


def _update(sizes: UnitSizes, run: TrainingRun, ranks: int) -> dict[str, float]:
    """Bytes that the optimiser needs beyond what it holds: Muon all updates, and one whole matrix several times."""
    if run.optimizer != "muon":
        return {}
    together = max(sizes.largest_matrix, min(MUON_TOGETHER, sizes.matrices))
    return {"at work": 4 * sizes.matrices / ranks + 16 * together}
