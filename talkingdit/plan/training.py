# SPDX-License-Identifier: Apache-2.0
"""What a training step of a Wan-S2V model will take on a cluster: memory per GPU, communication, time, the best layout.

Memory and communication follow from what training/parallel.py does: parameters, gradients and optimiser states are cut
over shard x ring x ulysses ranks, tokens over ring x ulysses. Tests hold these formulas against counts of the real
program (docs/scaling.md). Time is operations by a share of the stated speed, and bytes by a bandwidth: an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from talkingdit.plan.generation import CONTEXT, EFFICIENCY, HOST_TO_DEVICE, SLACK, ClipShape, flops, tokens
from talkingdit.plan.units import Model, Unit, model_of

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
CHECKPOINTING = ("full", "selective", "off")
SUBSETS = ("all", "lora", "audio")
HOST_MEMORY = 200e9  # bytes per second of a node's memory, for optimisers that work there


@dataclass(frozen=True)
class Cluster:
    """The machines.

    Args:
        nodes, gpus: machines, and GPUs in each.
        memory: bytes of a GPU.
        tflops: dense bfloat16 TFLOP/s as stated.
        efficiency: share of them that a training step reaches.
        inside, between: bytes per second that a GPU sends within its machine (NVLink) and, at the same time, by its
            own link to others (network).
        measured: which of the three before are measured and not assumed.
    """

    nodes: int = 1
    gpus: int = 8
    memory: float = 80 * 2**30
    tflops: float = 989.0
    efficiency: float = EFFICIENCY
    inside: float = 300e9
    between: float = 40e9
    measured: frozenset[str] = frozenset()

    @property
    def world(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of the mesh; their product is the number of ranks."""

    replicate: int = 1
    shard: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sharded(self) -> int:
        """Ranks that share the parameters."""
        return self.shard * self.ring * self.ulysses

    @property
    def context(self) -> int:
        """Ranks that share a sequence."""
        return self.ring * self.ulysses

    @property
    def data(self) -> int:
        """Ranks, or groups of them, with samples of their own."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        named = ("replicate", "shard", "ring", "ulysses")
        return " ".join(f"--parallel.{name} {getattr(self, name)}" for name in named)


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Args:
        clip: of one micro-batch: its size and length.
        micro_batches: per step, over all ranks together.
        optimizer, checkpointing: one of OPTIMIZERS, of CHECKPOINTING.
        averages: keep an exponential moving average of what trains.
        offload: parameters' shards, gradients, optimiser states and averages lie on the host.
        trains: one of SUBSETS: all parameters, adapters on the linear layers (LoRA), or the audio modules.
        lora_rank: of the adapters.

    Raises:
        ValueError: another name.
    """

    clip: ClipShape
    micro_batches: int = 1
    optimizer: str = "adamw"
    checkpointing: str = "full"
    averages: bool = True
    offload: bool = False
    trains: str = "all"
    lora_rank: int = 32

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", OPTIMIZERS), ("checkpointing", CHECKPOINTING), ("trains", SUBSETS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"plan: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.micro_batches < 1:
            raise ValueError(f"plan: micro_batches must be at least 1, got {self.micro_batches}")


# ---- Memory ----------------------------------------------------------------------------------------------------------


def states(model: Model, run: Run, ranks: int) -> dict[str, float]:
    """Bytes per GPU (or, offloaded, per GPU's share of the host) between steps, without gradients."""
    trained = model.total(ranks, trained=True) / ranks
    muon = model.matrices / ranks if run.optimizer == "muon" else 0.0
    # 8 bits per moment and a float32 scale for every 256 of them.
    moments = 2 * (1 + 4 / 256) if run.optimizer == "adamw8bit" else 8
    return {
        "weights": 4 * model.total(ranks) / ranks,
        "optimiser": moments * (trained - muon) + 4 * muon,
        "averages": 4 * trained if run.averages else 0.0,
    }


def memory(config: Mapping[str, Any], model: Model, run: Run, layout: MeshSizes, size: int = 2) -> dict[str, float]:
    """Bytes per GPU at the worst moment, by what they are for; `size` is that of the compute dtype.

    The moments are the backwards of all blocks and injections, and the update. In units of tokens x dim a block keeps
    for its backward, besides the residual stream at its input and two more of it: 15 and 2 times ffn_dim / dim. Where
    a sequence is shared 13, the exchanged q, k and v (3), and gathered keys and values (2 per place of the ring).
    Frozen linear layers keep no inputs.
    """
    dim, wide = config["dim"], config["ffn_dim"] / config["dim"]
    ranks, ring = layout.sharded, layout.ring
    noisy, total = tokens(config, run.clip)
    local = math.ceil(total / layout.context)
    stream, narrow, heard = local * dim * 4, local * dim * size, min(noisy, local) * dim * size
    saved = 15 if layout.context == 1 else 13 + 3 * (layout.ulysses > 1) + 2 * ring * (ring > 1)
    hidden = 1 if run.trains == "audio" else 2  # ffn_dim wide tensors that are kept
    saved -= 2 if run.trains == "audio" else 0
    block_kept = {"off": (saved + hidden * wide) * narrow + 2 * stream, "selective": (9 + wide) * narrow, "full": 0.0}
    injection_kept = {"off": 4 * heard, "selective": 3 * heard, "full": 0.0}
    # All that is alive in a block's backward beyond its input: in its feed-forward, or in the attention of a long ring.
    block_whole = (saved + (hidden + 1) * wide) * narrow + 3 * stream
    if ring > 1:
        block_whole = max(block_whole, (4 * ring + 8) * narrow + 2 * stream)
    injection_whole = 8 * heard + 2 * stream

    def parts(name: str) -> tuple[float, float]:
        """What a unit of the walk keeps, and what it needs besides in its backward."""
        if name.startswith("blocks."):
            return block_kept[run.checkpointing], block_whole - block_kept[run.checkpointing]
        return injection_kept[run.checkpointing], injection_whole - injection_kept[run.checkpointing]

    held = states(model, run, ranks)
    gradient = {name: 4 * unit.elements(ranks, trained=True) / ranks for name, unit in model.units.items()}
    root, head = model.units[""], model.units["head"]
    always = size * root.elements(ranks) + 4 * head.elements(ranks)
    mine = max(1, run.micro_batches // layout.data)
    back = model.back
    kept = sum(stream + parts(name)[0] for name in back)
    done = sum(gradient.values()) if mine > 1 else gradient["head"]
    moments = []
    before = 4.0 * head.elements(ranks, trained=True)  # what the unit before this one is still reducing
    for i in range(len(back) - 1, -1, -1):
        name = back[i]
        unit = model.units[name]
        following = model.units[back[i - 1]] if i and ranks > 1 else Unit(False)
        first = size * dim * config["ffn_dim"] if name.startswith("blocks.") and unit.matrices else 0
        gathered = always + size * (unit.elements(ranks) + following.elements(ranks)) + before + first
        moments.append({"gradients": done, "gathered": gathered, "kept": kept, "at work": parts(name)[1]})
        kept -= stream + parts(name)[0]
        before = 4.0 * unit.elements(ranks, trained=True)
        done += 0.0 if mine > 1 else gradient[name]
    moments.append({"gradients": sum(gradient.values()), **_update(config, model, run, ranks)})
    worst = max(moments, key=lambda moment: sum(moment.values()) - run.offload * moment["gradients"])
    if run.offload:
        held, worst = {}, {**worst, "gradients": 0.0}
    pixels = run.clip.pixels / 64 * run.clip.latents
    past = run.clip.pixels / 64 * run.clip.history * config["in_dim"]
    conditions = 4 * pixels * (2 * config["in_dim"] + config["cond_dim"]) + (4 + size) * past
    conditions += 4 * config["text_len"] * config["text_dim"]
    conditions += 4 * size * dim * config["text_len"]
    conditions += 2 * size * len(config["audio_inject_layers"]) * run.clip.latents * dim
    return {**held, **worst, "conditions": conditions}


def _update(config: Mapping[str, Any], model: Model, run: Run, ranks: int) -> dict[str, float]:
    """Bytes that the optimiser needs beyond what it holds: Muon all updates, and one whole matrix several times."""
    if run.optimizer != "muon" or run.offload:
        return {}
    return {"at work": 4 * model.matrices / ranks + 16 * config["dim"] * config["ffn_dim"]}


# ---- Communication ---------------------------------------------------------------------------------------------------


class Sent(NamedTuple):
    """Bytes that a GPU sends per step: all, and those that leave its node by its own link."""

    bytes: float
    outside: float

    def seconds(self, cluster: Cluster) -> float:
        return max((self.bytes - self.outside) / cluster.inside, self.outside / cluster.between)


def communication(
    config: Mapping[str, Any], model: Model, run: Run, layout: MeshSizes, gpus: int, size: int = 2
) -> dict[str, Sent]:
    """What a GPU sends per step, by what for.

    Gathering and reducing go round rings of the n ranks that share parameters: (n - 1) / n of what comes out or goes
    in. A ring leaves a node once for all its ranks there. Context parallelism (U: ulysses, R: ring, M bytes of one of
    q, k, v of the whole sequence, P = U R) sends 4 (M / P) (U - 1) / U + 2 (M / U) (R - 1) / R forward, the same
    backward, and the same when a block is run again.
    """
    _, total = tokens(config, run.clip)
    mine = max(1, run.micro_batches // layout.data)
    u, r, p, n = layout.ulysses, layout.ring, layout.context, layout.sharded
    local = math.ceil(total / p)
    one = local * config["dim"] * size
    blocks = sum(name.startswith("blocks.") for name in model.back)
    times = config["num_layers"] + blocks * (1 if run.checkpointing == "off" else 2)  # forward, again, backward
    across, along = mine * times * 4 * one * (u - 1) / u, mine * times * 2 * one * (r - 1)
    # Every rank ends with the whole velocity: the patches of all tokens in float32.
    velocity = mine * 4 * 4 * config["out_dim"] * local * (p - 1)

    gathered = reduced = 0.0
    for name, unit in model.units.items():
        once = name in ("", "head") or not (
            unit.reached or unit.fetched
        )  # those two stay gathered between forward and backward
        gathered += (1 if once else 2) * (4 if unit.float32 else size) * unit.elements(n)
        reduced += 4 * unit.elements(n, trained=True)
    share = (n - 1) / n
    copies = 2 * reduced / n * (layout.replicate - 1) / layout.replicate
    rows = 2 * 4 * model.matrices / n * share if run.optimizer == "muon" else 0.0

    def round_ring(amount: float, ranks: int, stride: int = 1) -> Sent:
        """Of a ring over every `stride`-th rank."""
        within = min(ranks, max(1, gpus // stride))
        return Sent(amount, amount / within if ranks > within else 0.0)

    def directly(amount: float, ranks: int, stride: int = 1) -> Sent:
        within = min(ranks, max(1, gpus // stride))
        return Sent(amount, amount * (ranks - within) / (ranks - 1) if ranks > within else 0.0)

    # The gather of keys goes round a ring; its backward, and "ring" mode, send directly.
    forward = along * (times - blocks) / times
    parts = (directly(across, u), round_ring(forward, r, u), directly(along - forward, r, u), round_ring(velocity, p))
    return {
        "gather": round_ring(mine * gathered * share, n),
        "reduce": round_ring(mine * reduced * share, n),
        "replicas": round_ring(copies, layout.replicate, n),
        "optimiser": directly(rows, n),
        "context": Sent(sum(part.bytes for part in parts), sum(part.outside for part in parts)),
    }


# ---- Time, and the choice of a layout --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainPlan:
    """A prediction for one layout, per GPU: bytes and seconds."""

    layout: MeshSizes
    run: Run
    memory: dict[str, float]  # by what it is for
    host: float  # bytes on the host per GPU
    sent: dict[str, Sent]
    flops: float  # of a step, all GPUs together, without what is computed twice
    seconds: dict[str, float]  # computing, and what is not hidden behind it

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def needed(self) -> float:
        """Bytes that a card should have: the peak, the allocator's losses and the driver's context."""
        return SLACK * self.peak + CONTEXT

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def work(config: Mapping[str, Any], model: Model, run: Run) -> tuple[float, float]:
    """Floating point operations of one micro-batch: of the mathematics, and as executed.

    A backward costs one forward for the gradients of inputs and one for those of weights, where they train; executed
    attention makes its scores again, 2.5 forwards. "full" runs every block twice, "selective" what is cheap.
    """
    _, total = tokens(config, run.clip)
    attention = config["num_layers"] * 4 * total**2 * config["dim"]
    products = flops(config, run.clip) - attention
    share = model.total(trained=True) / model.total()
    needed = products * (2 + share) + 3 * attention
    executed = needed + 0.5 * attention + (products + attention if run.checkpointing == "full" else 0.0)
    return needed, executed


def predict(config: Mapping[str, Any], run: Run, cluster: Cluster, layout: MeshSizes, model: Model) -> TrainPlan:
    """Memory, communication and time of one layout.

    Gathering and reducing go on beside the computing, as far as they fit under it; what context parallelism exchanges
    the next operation waits for, and so does what an offloaded optimiser moves.
    """
    sent = communication(config, model, run, layout, cluster.gpus)
    mine = max(1, run.micro_batches // layout.data)
    needed, executed = work(config, model, run)
    compute = executed * mine / layout.context / (cluster.tflops * 1e12 * cluster.efficiency)
    sharding = sum(sent[name].seconds(cluster) for name in ("gather", "reduce", "replicas"))
    seconds = {
        "computing": compute,
        "context parallelism": sent["context"].seconds(cluster),
        "sharding beyond computing": max(0.0, sharding - compute),
        "exchange of the optimiser": sent["optimiser"].seconds(cluster),
    }
    host = 0.0
    if run.offload:
        trained = 4 * model.total(layout.sharded, trained=True) / layout.sharded
        held = states(model, run, layout.sharded)
        host = sum(held.values()) + trained
        moved = mine * (2 * held["weights"] + trained)
        # Weights, moments and averages are read and written, gradients read.
        seconds["host"] = moved / HOST_TO_DEVICE + cluster.gpus * (2 * (host - trained) + trained) / HOST_MEMORY
    return TrainPlan(layout, run, memory(config, model, run, layout), host, sent, needed * run.micro_batches, seconds)


def layouts(config: Mapping[str, Any], run: Run, cluster: Cluster) -> Iterator[MeshSizes]:
    """All layouts of the cluster that the heads and the number of micro-batches allow."""
    for replicate in _divisors(cluster.nodes):
        rest = cluster.world // replicate
        for context in _divisors(rest):
            shard = rest // context
            if run.micro_batches % (replicate * shard):
                continue
            for ulysses in _divisors(context):
                if config["num_heads"] % ulysses == 0:
                    yield MeshSizes(replicate, shard, context // ulysses, ulysses)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


# Switches, in groups: of the first group with one that fits the fastest is taken. Those behind cost more than time.
CHANGES: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"checkpointing": "off"}, {"checkpointing": "selective"}, {"checkpointing": "full"}),
    ({"checkpointing": "full", "optimizer": "adamw8bit"},),
    ({"checkpointing": "full", "offload": True},),
)


def best(
    config: Mapping[str, Any], run: Run, cluster: Cluster, given: frozenset[str] = frozenset()
) -> tuple[TrainPlan, bool]:
    """The fastest layout that fits, with as few switches as that takes, and True; if none fits the smallest, and False.

    Args:
        given: names of the run's switches that are not to be changed.
    """
    possible = list(layouts(config, run, cluster))  # at least a ring of all
    model = model_of(config, run)
    tried: list[TrainPlan] = []
    for group in CHANGES:
        changes = [{name: value for name, value in change.items() if name not in given} for change in group]
        runs = dict.fromkeys(replace(run, **change) for change in changes)
        plans = [predict(config, one, cluster, layout, model) for one in runs for layout in possible]
        fitting = [plan for plan in plans if plan.needed <= cluster.memory]
        if fitting:
            return min(fitting, key=lambda plan: (plan.step_seconds, plan.needed)), True
        tried += plans
    return min(tried, key=lambda plan: plan.needed), False
