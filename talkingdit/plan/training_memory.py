# SPDX-License-Identifier: Apache-2.0
"""Memory of a training step per GPU: what is held between steps, and what the worst moment of a step adds.

It follows from what training/parallel.py does: parameters, gradients and optimiser states are cut over shard x ring x
ulysses ranks, tokens over ring x ulysses. Tests hold it against counts of the real program (docs/scaling.md).
"""

from __future__ import annotations

from talkingdit.plan.run import MeshSizes, Run
from talkingdit.plan.transformer import Transformer
from talkingdit.plan.units import UnitSize, UnitSizes


def states(sizes: UnitSizes, run: Run, ranks: int) -> dict[str, float]:
    """Bytes per GPU (or, offloaded, per GPU's part of the host) between steps, without gradients."""
    trained = sizes.total(ranks, trained=True) / ranks
    muon = sizes.matrices / ranks if run.optimizer == "muon" else 0.0
    # 8 bits per moment and a float32 scale for every 256 of them.
    moments = 2 * (1 + 4 / 256) if run.optimizer == "adamw8bit" else 8
    return {
        "weights": 4 * sizes.total(ranks) / ranks,
        "optimiser": moments * (trained - muon) + 4 * muon,
        "averages": 4 * trained if run.averages else 0.0,
    }


def memory(transformer: Transformer, sizes: UnitSizes, run: Run, mesh: MeshSizes, size: int = 2) -> dict[str, float]:
    """Bytes per GPU at the worst moment, by what they are for; `size` is that of the compute dtype.

    The moments are the backwards of the units of the walk, and the update.
    """
    activations = transformer.cost.activations(transformer.config, run, mesh, size)
    ranks = mesh.sharded
    held = states(sizes, run, ranks)
    gradient = {name: 4 * unit.elements(ranks, trained=True) / ranks for name, unit in sizes.units.items()}
    always = sum((4 if u.float32 else size) * u.elements(ranks) for u in sizes.units.values() if u.stays)
    several = run.per_rank(mesh) > 1  # gradients of earlier micro-batches are there already
    back = sizes.back
    kept = sum(activations.stream + activations.kept[name] for name in back)
    done = sum(gradient.values()) if several else sum(gradient[name] for name in sizes.last)
    # What the unit before this one is still reducing.
    before = sum(4.0 * sizes.units[name].elements(ranks, trained=True) for name in sizes.last)
    moments = []
    for i in range(len(back) - 1, -1, -1):
        name, unit = back[i], sizes.units[back[i]]
        following = sizes.units[back[i - 1]] if i and ranks > 1 else UnitSize()
        first = size * max(unit.matrices, default=0)  # the first gradient, before it is part of what is reduced
        gathered = always + size * (unit.elements(ranks) + following.elements(ranks)) + before + first
        moments.append({"gradients": done, "gathered": gathered, "kept": kept, "at work": activations.working[name]})
        kept -= activations.stream + activations.kept[name]
        before = 4.0 * unit.elements(ranks, trained=True)
        done += 0.0 if several else gradient[name]
    moments.append({"gradients": sum(gradient.values()), **_update(sizes, run, ranks)})
    worst = max(moments, key=lambda moment: sum(moment.values()) - run.offload * moment["gradients"])
    if run.offload:
        held, worst = {}, {**worst, "gradients": 0.0}
    return {**held, **worst, "conditions": activations.conditions}


def _update(sizes: UnitSizes, run: Run, ranks: int) -> dict[str, float]:
    """Bytes that the optimiser needs beyond what it holds: Muon all updates, and one whole matrix several times."""
    if run.optimizer != "muon" or run.offload:
        return {}
    return {"at work": 4 * sizes.matrices / ranks + 16 * sizes.largest_matrix}
