# SPDX-License-Identifier: Apache-2.0
"""The verb `talkingdit plan`: what generating takes on a card or, with `--train`, what training takes on a cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from talkingdit import families
from talkingdit.cli.flags import Group, read
from talkingdit.errors import UserError
from talkingdit.families.flag import SIDES, Flag

if TYPE_CHECKING:
    from talkingdit.plan.generation import ClipShape
    from talkingdit.plan.training import Cluster, TrainPlan

COMMAND = "talkingdit plan"
ABOUT = "Predict memory and time of a clip, or of training on clips; nothing is loaded."
_CONSTANTS = ("efficiency", "inside", "between")


def _check(flags: Any, *counts: str, speeds: Sequence[str] = ()) -> None:
    """Raises: ValueError: a count is below 1, or a speed is none."""
    for name in counts:
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"plan: {name} must be at least 1, got {value}")
    for name in speeds:
        value = getattr(flags, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"plan: {name} must be a number of at least 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class ClipFlags:
    """What is planned."""

    checkpoint: Annotated[Path | None, Flag("DIR")] = None
    """folder of the checkpoint (this or --preset is required)"""
    preset: Annotated[str | None, Flag("NAME")] = None
    """a configuration by name, such as wan_s2v_14b"""
    size: Annotated[tuple[int, int], SIDES] = (448, 832)
    """of the frames"""
    card: Annotated[str, Flag("CARD")] = "24GB"
    """memory such as 24GB, or a name such as h100"""
    tflops: Annotated[float | None, Flag("T")] = None
    """stated bfloat16 speed of the card, for the time (default: that of a card given by name)"""
    frames: Annotated[int, Flag("N")] = 80
    """frames per clip"""
    pose: bool = False
    """with a pose video"""

    def __post_init__(self) -> None:
        _check(self, "frames", speeds=("tflops",))


@dataclass(frozen=True, kw_only=True)
class GenerationFlags:
    """How a clip is generated."""

    steps: Annotated[int, Flag("N")] = 40
    """denoising steps per clip"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the weights"""
    sequential: bool = False
    """one prediction of guidance after the other"""
    plain: bool = False
    """no guidance: one prediction per step"""
    memory: Annotated[str, Flag("SWITCHES")] = ""
    """e.g. offload=block,text_encoder=cpu"""

    def __post_init__(self) -> None:
        _check(self, "steps")


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """How training is laid out."""

    train: bool = False
    """plan training"""
    gpus: Annotated[int, Flag("N")] = 8
    """per node"""
    nodes: Annotated[int, Flag("N")] = 1
    """machines"""
    micro_batches: Annotated[int | None, Flag("N")] = None
    """per step, on all GPUs together (default: one per node)"""
    optimizer: Annotated[str | None, Flag("NAME")] = None
    """adamw, adamw8bit or muon"""
    checkpointing: Annotated[str | None, Flag("MODE")] = None
    """of activations: full, selective or off"""
    no_averages: bool = False
    """without running averages of the weights"""
    offload: bool = False
    """shards, gradients and optimiser states on the host"""
    train_only: Annotated[str, Flag("PART")] = ""
    """lora (adapters on linear layers) or audio (its modules)"""
    lora_rank: Annotated[int, Flag("N")] = 32
    """of the adapters"""
    inside: Annotated[float | None, Flag("GB/s")] = None
    """that a GPU sends within a node (default: 300)"""
    between: Annotated[float | None, Flag("GB/s")] = None
    """that a GPU sends to other nodes (default: 40)"""
    measured: Annotated[Path | None, Flag("JSON")] = None
    """constants measured by bench/train_step.py"""

    def __post_init__(self) -> None:
        _check(self, "gpus", "nodes", "micro_batches", "lora_rank", speeds=("inside", "between"))


GROUPS = (
    Group(ClipFlags),
    Group(GenerationFlags, "generation"),
    Group(TrainingFlags, "training", "switches that are not given are chosen so that it fits"),
)


def plan(argv: Sequence[str]) -> None:
    """Carry out the verb.

    Raises:
        UserError: something is wrong with the command line or the checkpoint.
        SystemExit: after the help.
    """
    values = read(COMMAND, ABOUT, GROUPS, argv)
    values.refuse_unknown()
    flags, how, training = values.make(ClipFlags), values.make(GenerationFlags), values.make(TrainingFlags)
    if flags.checkpoint is not None and flags.preset is not None:
        values.refuse("argument --preset: not allowed with argument --checkpoint")
    if flags.checkpoint is None and flags.preset is None:
        values.refuse("one of the arguments --checkpoint --preset is required")
    # What needs no torch is checked first.
    if flags.preset is not None:
        families.of_preset(flags.preset)
    elif flags.checkpoint is not None and not flags.checkpoint.is_dir():
        raise UserError(f"{flags.checkpoint}: the checkpoint must be a folder, and there is none of this name.")
    if flags.frames % 4:
        raise UserError(f"plan: a clip must have a multiple of 4 frames, got {flags.frames}.")
    sys.stdout.write(_report(flags, how, training) + "\n")


def _report(flags: ClipFlags, how: GenerationFlags, training: TrainingFlags) -> str:
    import torch

    from talkingdit.pipelines.memory import Memory
    from talkingdit.plan import generation

    card, speed = generation.card_of(flags.card)
    speed = flags.tflops or speed
    dtype = getattr(torch, how.dtype)
    config, parts = generation.source(str(flags.checkpoint or flags.preset), dtype)
    height, width = flags.size
    try:
        memory = Memory.parse(how.memory)
        clip = generation.ClipShape(
            height=height,
            width=width,
            latents=flags.frames // 4,
            history=config["motion_frames"][1],
            steps=how.steps,
            branches=1 if how.plain else 2,
            batched=not how.sequential and not how.plain,
            pose=flags.pose,
        )
        if training.train:
            return _train(training, config, clip, card, speed)
    except ValueError as error:
        raise UserError(f"{str(error).removesuffix('.')}.") from error

    def again(memory: Memory, clip: ClipShape) -> generation.Plan:
        return generation.predict(config, parts, clip, memory, dtype, speed)

    found = again(memory, clip)
    return generation.report(found, card, speed, generation.advice(found, again, card))


def _train(flags: TrainingFlags, config: Mapping[str, Any], clip: ClipShape, card: float, speed: float | None) -> str:
    from talkingdit.plan import training

    if speed is None:
        raise UserError("plan: --train needs the speed of the card: name one with --card, or give --tflops.")
    cluster = training.Cluster(flags.nodes, flags.gpus, card, speed)
    links: Any = {name: 1e9 * value for name in ("inside", "between") if (value := getattr(flags, name))}
    cluster = replace(cluster, **links)
    if flags.measured is not None:
        cluster = measured(cluster, flags.measured)
    chosen = {"optimizer": flags.optimizer, "checkpointing": flags.checkpointing}
    chosen |= {"averages": False if flags.no_averages else None, "offload": flags.offload or None}
    given = {name: value for name, value in chosen.items() if value is not None}
    run = training.Run(
        clip, flags.micro_batches or flags.nodes, trains=flags.train_only or "all", lora_rank=flags.lora_rank, **given
    )
    found, fits = training.best(config, run, cluster, frozenset(given))
    return report(found, fits, config, cluster, flags.measured)


def measured(cluster: Cluster, path: Path) -> Cluster:
    """The cluster with the constants of a file: {"constants": {"efficiency": 0.4, "inside": 3e11, "between": 4e10}}.

    Raises:
        UserError: no such file, or not of that form.
    """
    try:
        found = json.loads(path.read_text())["constants"]
        values: Any = {name: float(found[name]) for name in _CONSTANTS if name in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"plan: --measured must be a file that bench/train_step.py wrote, got {path} ({error})."
        ) from error
    if not values or min(values.values()) <= 0:
        wanted = ", ".join(_CONSTANTS)
        raise UserError(f"plan: {path}: constants must be numbers over 0 by the names {wanted}, got {found}.")
    return replace(cluster, **values, measured=frozenset(values))


def report(plan: TrainPlan, fits: bool, config: Mapping[str, Any], cluster: Cluster, source: Path | None = None) -> str:
    """The prediction in words."""
    from talkingdit.plan.generation import GB, tokens

    run, clip = plan.run, plan.run.clip
    noisy, total = tokens(config, clip)
    parts = {
        "all": "all parameters",
        "lora": f"adapters of rank {run.lora_rank}",
        "audio": "casual_audio_encoder and audio_injector",
    }
    gpus = f"{cluster.nodes} x {cluster.gpus} GPUs" if cluster.nodes > 1 else f"{cluster.gpus} GPUs"
    lines = [
        f"clip        {clip.width} x {clip.height}, {4 * clip.latents} frames: {total} tokens, {noisy} of them noisy",
        f"step        {run.micro_batches} micro-batch{'es' * (run.micro_batches > 1)} of a clip on {gpus}",
        f"trains      {parts[run.trains]}{'' if run.averages else ', without averages of the weights'}",
        f"layout      {plan.layout}",
        f"switches    --parallel.activation-checkpointing {run.checkpointing} --optim.name {run.optimizer} "
        f"--batch.count {run.micro_batches}{' --parallel.offload' if run.offload else ''}"
        f"{f' --lora.rank {run.lora_rank}' if run.trains == 'lora' else ''}",
    ]
    lines += [f"{'memory':<12}{name:<30}{value / GB:8.2f} GB" for name, value in plan.memory.items() if value > 5e6]
    lines.append(f"{'needed':<42}{plan.needed / GB:8.2f} GB with the driver's context and fragmentation")
    lines.append(f"{'card':<42}{cluster.memory / GB:8.2f} GB")
    if plan.host:
        lines.append(f"{'host':<42}{plan.host * cluster.gpus / GB:8.2f} GB of memory per node")
    for name, sent in plan.sent.items():
        if sent.bytes:
            outside = f", {sent.outside / GB:.2f} GB of them to other nodes" if sent.outside else ""
            lines.append(f"{'sent':<12}{name:<30}{sent.bytes / GB:8.2f} GB per GPU and step{outside}")
    lines += [f"{'time':<12}{name:<30}{value:8.2f} s" for name, value in plan.seconds.items() if value >= 0.005]
    used = plan.flops / plan.step_seconds / cluster.world / (cluster.tflops * 1e12)
    lines.append(
        f"{'step':<42}{plan.step_seconds:8.2f} s, {total * run.micro_batches / plan.step_seconds:.0f} tokens/s, "
        f"{used:.0%} of the stated speed: an estimate, not a measurement"
    )
    constants = {
        "efficiency": f"{cluster.efficiency:.0%} of {cluster.tflops:.0f} TFLOP/s while it computes",
        "inside": f"{cluster.inside / 1e9:.0f} GB/s within a node",
        "between": f"{cluster.between / 1e9:.0f} GB/s per GPU between nodes",
    }
    for name, words in constants.items():
        origin = f"measured ({source})" if name in cluster.measured else "assumed"
        lines.append(f"{'constant':<12}{words}: {origin}")
    if not fits:
        lines.append(
            f"does not fit: the layout and switches that need least still take {plan.needed / GB:.2f} GB of the card's "
            f"{cluster.memory / GB:.2f} GB; take more GPUs, a smaller or shorter clip, or --train-only lora"
        )
    else:
        lines.append("fits")
    return "\n".join(lines)
