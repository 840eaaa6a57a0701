# SPDX-License-Identifier: Apache-2.0
"""What a GPU sends per training step, by what for. Tests hold it against counts of the real program."""

from __future__ import annotations

from typing import NamedTuple

from talkingdit.plan.run import Cluster, MeshSizes, TrainingRun
from talkingdit.plan.transformer import Transformer
from talkingdit.plan.units import UnitSizes


class Sent(NamedTuple):
    """Bytes that a GPU sends per step: all, and those that leave its node by its own link."""

    bytes: float
    outside: float

    def seconds(self, cluster: Cluster) -> float:
        return max((self.bytes - self.outside) / cluster.inside, self.outside / cluster.between)


def communication(
    transformer: Transformer, sizes: UnitSizes, run: TrainingRun, mesh: MeshSizes, gpus: int, size: int = 2
) -> dict[str, Sent]:
    """What a GPU sends per step, by what for; `gpus` are in a node.

    Gathering and reducing go round rings of the n ranks that share parameters: (n - 1) / n of what comes out or goes
    in. A ring leaves a node once for all its ranks there.
    """
    mine, n = run.per_rank(mesh), mesh.sharded
    gathered = reduced = 0.0
    for unit in sizes.units.values():
        once = unit.stays or not (unit.reached or unit.fetched)  # gathered in the forward, not again in the backward
        gathered += (1 if once else 2) * (4 if unit.float32 else size) * unit.elements(n)
        reduced += 4 * unit.elements(n, trained=True)
    share = (n - 1) / n
    copies = 2 * reduced / n * (mesh.replicate - 1) / mesh.replicate
    rows = 2 * 4 * sizes.matrices / n * share if run.optimizer == "muon" else 0.0
    return {
        "gather": _ring(gpus, mine * gathered * share, n),
        "reduce": _ring(gpus, mine * reduced * share, n),
        "replicas": _ring(gpus, copies, mesh.replicate, n),
        "optimiser": _direct(gpus, rows, n),
        "context": _context(transformer, sizes, run, mesh, gpus, size),
    }


def _context(
    transformer: Transformer, sizes: UnitSizes, run: TrainingRun, mesh: MeshSizes, gpus: int, size: int
) -> Sent:
    """What ranks that share a sequence exchange.

    Context parallelism (U: ulysses, R: ring, M bytes of one of q, k, v of the whole sequence, P = U R) sends
    4 (M / P) (U - 1) / U + 2 (M / U) (R - 1) / R forward, the same backward, and the same when a block is run again.
    """
    activations = transformer.cost.activations(transformer.config, run, mesh, size)
    mine, u, r, p = run.per_rank(mesh), mesh.ulysses, mesh.ring, mesh.context
    one = activations.exchanged
    again = sum(name in activations.attending for name in sizes.back)
    times = len(activations.attending) + again * (1 if run.checkpointing == "off" else 2)  # forward, again, backward
    across, along = mine * times * 4 * one * (u - 1) / u, mine * times * 2 * one * (r - 1)
    output = mine * activations.output * (p - 1)  # every rank ends with the whole
    # The gather of keys goes round a ring; its backward, and "ring" mode, send directly.
    forward = along * (times - again) / times
    parts = (
        _direct(gpus, across, u),
        _ring(gpus, forward, r, u),
        _direct(gpus, along - forward, r, u),
        _ring(gpus, output, p),
    )
    return Sent(sum(part.bytes for part in parts), sum(part.outside for part in parts))


def _ring(gpus: int, amount: float, ranks: int, stride: int = 1) -> Sent:
    """Of a ring over every `stride`-th rank."""
    within = min(ranks, max(1, gpus // stride))
    return Sent(amount, amount / within if ranks > within else 0.0)


def _direct(gpus: int, amount: float, ranks: int, stride: int = 1) -> Sent:
    """Of messages between every two of these ranks."""
    within = min(ranks, max(1, gpus // stride))
    return Sent(amount, amount * (ranks - within) / (ranks - 1) if ranks > within else 0.0)
