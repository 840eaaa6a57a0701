# SPDX-License-Identifier: Apache-2.0
"""What a training step will take on a cluster: memory per GPU, communication, time, and the best layout.

Time is operations by a share of the stated speed, and bytes by a bandwidth: an estimate (docs/scaling.md).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from talkingdit.plan.cards import EIGHT_BIT_SPEED, HOST_MEMORY, HOST_TO_DEVICE, needed
from talkingdit.plan.communication import Sent, communication
from talkingdit.plan.run import EIGHT_BITS, Cluster, MeshSizes, TrainingRun
from talkingdit.plan.training_memory import host, margins, memory, moments, states, validation
from talkingdit.plan.transformer import Transformer
from talkingdit.plan.units import UnitSizes, unit_sizes


@dataclass(frozen=True)
class TrainPlan:
    """A prediction for one layout, per GPU: bytes and seconds."""

    mesh: MeshSizes
    run: TrainingRun
    memory: dict[str, float]  # by what it is for, while a step is made
    margins: dict[str, float]  # what no tensor takes
    validation: dict[str, float]  # by what it is for, while a video is made; empty if none is
    host: dict[str, float]  # bytes on the host per GPU
    sent: dict[str, Sent]
    flops: float  # of a step, over all GPUs, without what is computed twice
    seconds: dict[str, float]  # computing, and what is not hidden behind it

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def needed(self) -> float:
        """Bytes that a card should have: the peak of a step or of validation, with margins for communicators and pools,
        the allocator's losses and the driver's context."""
        while_training = self.peak + self.margins.get("pools", 0.0)
        return needed(max(while_training, sum(self.validation.values()))) + self.margins.get("communicators", 0.0)

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def work(transformer: Transformer, sizes: UnitSizes, run: TrainingRun) -> tuple[float, float]:
    """Floating point operations of one micro-batch: of the mathematics, and as executed.

    A backward costs one forward for the gradients of inputs and one for those of weights, where they train; executed
    attention makes its scores again, 2.5 forwards. "full" runs every block twice, "selective" what is cheap.
    """
    attention = transformer.cost.attention_flops(transformer.config, run.clip)
    products = transformer.flops(run.clip) - attention
    share = sizes.total(trained=True) / sizes.total()
    mathematics = products * (2 + share) + 3 * attention
    executed = mathematics + 0.5 * attention + (products + attention if run.checkpointing == "full" else 0.0)
    return mathematics, executed


def in_float8(transformer: Transformer, run: TrainingRun) -> float:
    """Of the executed operations of a micro-batch those that multiply in float8; layers stored in eight bits do not."""
    if run.float8 == "off" or run.eight_bits:
        return 0.0
    products = transformer.flops(run.clip) - transformer.cost.attention_flops(transformer.config, run.clip)
    return products * (1 + (run.checkpointing == "full") + (run.float8 == "rowwise"))


def predict(
    transformer: Transformer, sizes: UnitSizes, run: TrainingRun, cluster: Cluster, mesh: MeshSizes
) -> TrainPlan:
    """Memory, communication and time of one layout.

    Gathering and reducing go on beside the computing, as far as they fit under it; what context parallelism exchanges
    the next operation waits for, and so does what an offloaded optimiser moves.
    """
    sent = communication(transformer, sizes, run, mesh, cluster.gpus)
    mine = run.per_rank(mesh)
    mathematics, executed = work(transformer, sizes, run)
    timed = executed - in_float8(transformer, run) * (1 - 1 / EIGHT_BIT_SPEED)
    compute = timed * mine / mesh.context / (cluster.tflops * 1e12 * cluster.efficiency)
    sharding = sum(sent[name].seconds(cluster) for name in ("gather", "reduce", "replicas"))
    seconds = {
        "computing": compute,
        "context parallelism": sent["context"].seconds(cluster),
        "sharding beyond computing": max(0.0, sharding - compute),
        "exchange of the optimiser": sent["optimiser"].seconds(cluster),
    }
    if run.offload:
        trained = 4 * sizes.total(mesh.sharded, trained=True) / mesh.sharded
        held = states(sizes, run, mesh.sharded)
        offloaded = sum(held.values()) + trained
        moved = mine * (2 * held["weights"] + trained)
        # Weights, moments and averages are read and written, gradients read.
        seconds["host"] = moved / HOST_TO_DEVICE + cluster.gpus * (2 * (offloaded - trained) + trained) / HOST_MEMORY
    elif swapped := sizes.eight_bytes(True):
        seconds["host"] = mine * (3 if run.checkpointing == "full" else 2) * swapped / HOST_TO_DEVICE
    return TrainPlan(
        mesh,
        run,
        memory=memory(transformer, sizes, run, mesh),
        margins=margins(mesh, moments(transformer, sizes, run, mesh)),
        validation=validation(transformer, sizes, run, mesh) if run.validates else {},
        host=host(transformer, sizes, run, mesh),
        sent=sent,
        flops=mathematics * run.micro_batches,
        seconds=seconds,
    )


def layouts(heads: int, run: TrainingRun, cluster: Cluster) -> Iterator[MeshSizes]:
    """All layouts of the cluster that the heads and the number of micro-batches allow."""
    for replicate in _divisors(cluster.nodes):
        rest = cluster.world // replicate
        for context in _divisors(rest):
            shard = rest // context
            if run.micro_batches % (replicate * shard):
                continue
            for ulysses in _divisors(context):
                if heads % ulysses == 0:
                    yield MeshSizes(replicate, shard, context // ulysses, ulysses)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def fits(plan: TrainPlan, cluster: Cluster) -> bool:
    """Whether a machine has what a plan needs, on its cards and, where that is limited, beside them."""
    return plan.needed <= cluster.memory and sum(plan.host.values()) * cluster.gpus <= cluster.host


# Switches, in groups: of the first group with one that fits the fastest is taken. Those behind cost more than time.
CHANGES: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"checkpointing": "off"}, {"checkpointing": "selective"}, {"checkpointing": "full"}),
    ({"checkpointing": "full", "optimizer": "adamw8bit"},),
    ({"checkpointing": "full", "offload": True},),
)
_FULL: dict[str, Any] = {"checkpointing": "full"}
_EIGHT: dict[str, Any] = {**_FULL, "optimizer": "adamw8bit", "frozen": "int8", "inputs": "host_bf16"}


def _changes(run: TrainingRun, units: int) -> tuple[tuple[dict[str, Any], ...], ...]:
    """The groups for what a run trains; `units` are the large ones.

    Frozen weights in bfloat16 change nothing, so a run of adapters has them so. Then what is exact comes before what
    rounds: inputs of blocks on the host, everything on the host, and at last eight bits with as few units swapped as
    it takes.
    """
    if run.trains != "lora":
        return CHANGES
    groups: tuple[tuple[dict[str, Any], ...], ...] = (
        CHANGES[0],
        ({**_FULL, "optimizer": "adamw8bit"},),
        ({**_FULL, "inputs": "host"},),
        ({**_FULL, "inputs": "host", "offload": True},),
        *((({**_EIGHT, "swap": units * quarter // 4}),) for quarter in range(5)),
    )
    return tuple(tuple({"frozen": "bf16", **change} for change in group) for group in groups)


def best(
    transformer: Transformer, run: TrainingRun, cluster: Cluster, given: frozenset[str] = frozenset()
) -> tuple[TrainPlan, bool]:
    """The fastest layout that fits, with as few switches as that takes, and True; if none fits the smallest, and False.

    Args:
        given: names of the run's switches that are not to be changed.

    Raises:
        ValueError: the run trains what the family does not know.
    """
    heads = transformer.cost.heads(transformer.config)
    possible = list(layouts(heads, run, cluster))  # at least a ring of all
    tried: list[TrainPlan] = []
    for group in _changes(run, len(transformer.units.walk(transformer.config))):
        runs = dict.fromkeys(_changed(run, change, given) for change in group)
        plans = [
            predict(transformer, sizes, one, cluster, mesh)
            for one in runs
            for sizes in [unit_sizes(transformer, one)]
            for mesh in possible
        ]
        fitting = [plan for plan in plans if fits(plan, cluster)]
        if fitting:
            return min(fitting, key=lambda plan: (plan.step_seconds, plan.needed)), True
        tried += plans
    return min(tried, key=lambda plan: plan.needed), False


def _changed(run: TrainingRun, change: Mapping[str, Any], given: Container[str]) -> TrainingRun:
    """The run with the switches that are not given; where those rule eight bits out there is nothing to swap."""
    wanted = {name: value for name, value in change.items() if name not in given}
    if wanted.get("frozen", run.frozen) not in EIGHT_BITS:
        wanted.pop("swap", None)
    if wanted.get("checkpointing", run.checkpointing) == "off":
        wanted.pop("inputs", None)
    return replace(run, **wanted)
