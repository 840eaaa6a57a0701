# SPDX-License-Identifier: Apache-2.0
"""What is trained, on which machines, and how the work is laid out over them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from talkingdit.errors import UserError
from talkingdit.plan.cards import EFFICIENCY
from talkingdit.plan.clip import ClipShape

OPTIMIZERS = ("adamw", "adamw8bit", "muon")
CHECKPOINTING = ("full", "selective", "off")
FROZEN = ("float32", "bf16", "int8", "fp8")  # how weights that never train are stored
EIGHT_BITS = ("int8", "fp8")
INPUTS = {"float32": (4, False), "bf16": (2, False), "host": (4, True), "host_bf16": (2, True)}  # bytes, on the host?
FLOAT8 = ("off", "forward", "rowwise")  # which products of large layers are in float8
CONSTANTS = ("efficiency", "inside", "between")  # of a cluster, that can be measured


@dataclass(frozen=True)
class Cluster:
    """The machines.

    Args:
        nodes, gpus: machines, and GPUs in each.
        memory: bytes of a GPU.
        host: bytes of a machine's own memory that training may take.
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
    host: float = math.inf

    @property
    def world(self) -> int:
        return self.nodes * self.gpus


def measured(cluster: Cluster, path: Path) -> Cluster:
    """The cluster with the constants of a file: {"constants": {"efficiency": 0.4, "inside": 3e11, "between": 4e10}}.

    Raises:
        UserError: no such file, or not of that form.
    """
    try:
        found = json.loads(path.read_text())["constants"]
        values: Any = {name: float(found[name]) for name in CONSTANTS if name in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"plan: --measured must be a file that bench/train_step.py wrote, got {path} ({error})."
        ) from error
    if not values or min(values.values()) <= 0:
        wanted = ", ".join(CONSTANTS)
        raise UserError(f"plan: {path}: constants must be numbers over 0 by the names {wanted}, got {found}.")
    return replace(cluster, **values, measured=frozenset(values))


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
class TrainingRun:
    """What is trained, and how.

    Args:
        clip: of one micro-batch: its size and length.
        micro_batches: per step, over all ranks together.
        optimizer, checkpointing: one of OPTIMIZERS, of CHECKPOINTING.
        averages: keep an exponential moving average of what trains.
        frozen: how weights that never train are stored, one of FROZEN; in eight bits every rank holds all of them.
        swap: large units, the first ones, whose eight-bit weights wait on the host and come when they are used.
        inputs: where inputs of checkpointed blocks wait for the backward, one of INPUTS.
        offload: parameters' shards, gradients, optimiser states and averages lie on the host.
        asynchronous: checkpoints are written by a thread, from a copy on the host.
        validates: videos of the family's usual size are generated with the averages on the way.
        trains: "all" parameters, "lora" (adapters on the linear layers), or a part that the family names.
        lora_rank: of the adapters.
        float8: which products of large layers are in float8, one of FLOAT8: none, those of the forward, those of the
            gradients of inputs as well.

    Raises:
        ValueError: another name of an optimiser or of checkpointing. What trains is checked against the family by
            `talkingdit.plan.units.unit_sizes`.
    """

    clip: ClipShape
    micro_batches: int = 1
    optimizer: str = "adamw"
    checkpointing: str = "full"
    averages: bool = True
    frozen: str = "float32"
    swap: int = 0
    inputs: str = "float32"
    offload: bool = False
    asynchronous: bool = True
    validates: bool = True
    trains: str = "all"
    lora_rank: int = 32
    float8: str = "off"

    def __post_init__(self) -> None:
        known = {"optimizer": OPTIMIZERS, "checkpointing": CHECKPOINTING, "frozen": FROZEN, "inputs": tuple(INPUTS)}
        known["float8"] = FLOAT8
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"plan: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.swap and self.frozen not in EIGHT_BITS:
            raise ValueError(f"plan: swap moves weights in eight bits ({', '.join(EIGHT_BITS)}), got {self.frozen}")
        if self.micro_batches < 1:
            raise ValueError(f"plan: micro_batches must be at least 1, got {self.micro_batches}")

    @property
    def eight_bits(self) -> bool:
        """Are the large matrices that never train stored in eight bits? Of adapters' runs alone."""
        return self.frozen in EIGHT_BITS and self.trains == "lora"

    def per_rank(self, mesh: MeshSizes) -> int:
        """Micro-batches of a rank per step."""
        return max(1, self.micro_batches // mesh.data)
