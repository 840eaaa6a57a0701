# SPDX-License-Identifier: Apache-2.0
"""The verb `talkingdit plan`: what generating takes on a card or, with `--train`, what training takes on a cluster."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from talkingdit import families
from talkingdit.cli.flags import Group, read
from talkingdit.errors import UserError
from talkingdit.families.flag import INTERVAL, SIDES, Flag, check_guidance_interval
from talkingdit.models import find_checkpoint
from talkingdit.pipelines.schedules import ALL_STEPS, Interval, read_interval
from talkingdit.plan.clip import check_sides, latents_of

if TYPE_CHECKING:
    from talkingdit.plan.clip import ClipShape
    from talkingdit.plan.transformer import Transformer

COMMAND = "talkingdit plan"
LONGEST = 10**7  # seconds of a voice, four months
ABOUT = "Predict memory and time of a clip, or of training on clips; nothing is loaded."


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
    size: Annotated[tuple[int, int] | None, SIDES] = None
    """of the frames (default: of the family or checkpoint)"""
    card: Annotated[str, Flag("CARD")] = "24GB"
    """memory such as 24GB, or a name such as h100"""
    tflops: Annotated[float | None, Flag("T")] = None
    """stated bfloat16 speed of the card, for the time (default: that of a card given by name)"""
    frames: Annotated[int | None, Flag("N")] = None
    """frames per clip (default: of the family or checkpoint)"""
    pose: bool = False
    """with a pose video"""

    def __post_init__(self) -> None:
        _check(self, "frames", speeds=("tflops",))
        if self.size is not None:
            check_sides(*self.size)
        if self.frames is not None:
            latents_of(self.frames)


@dataclass(frozen=True, kw_only=True)
class GenerationFlags:
    """How a clip is generated."""

    steps: Annotated[int | None, Flag("N")] = None
    """denoising steps per clip (default: of the family or checkpoint)"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the weights"""
    sequential: bool = False
    """one prediction of guidance after the other"""
    plain: bool = False
    """no guidance: one prediction per step"""
    guidance_interval: Annotated[str, INTERVAL] = "0-1"
    """guidance in these shares of the steps only"""
    memory: Annotated[str, Flag("SWITCHES")] = ""
    """e.g. offload=block,text_encoder=cpu"""
    precision: Literal["fp8", "int8"] | None = None
    """large layers compute in eight bits"""
    seconds: Annotated[float | None, Flag("S")] = None
    """of the voice: what hearing it takes, and how many clips it makes"""
    audio: Annotated[Path | None, Flag("WAV")] = None
    """a voice, instead of its seconds"""

    def __post_init__(self) -> None:
        _check(self, "steps", speeds=("seconds",))
        check_guidance_interval(self.guidance_interval, "plan")
        if self.plain and read_interval(self.guidance_interval) != ALL_STEPS:
            raise ValueError("plan: guidance_interval says nothing where --plain leaves guidance out")
        if self.seconds is not None and self.audio is not None:
            raise ValueError("plan: seconds must be left to the voice where --audio is given")
        if self.seconds is not None and not 0.1 <= self.seconds <= LONGEST:
            raise ValueError(f"plan: seconds must be 0.1 to {LONGEST}, got {self.seconds:g}")


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
    frozen: Annotated[str | None, Flag("KIND")] = None
    """frozen weights: float32, bf16, int8 or fp8 (default for lora: bf16, or int8 where it must)"""
    swap: Annotated[int | None, Flag("N")] = None
    """blocks whose eight-bit weights wait on the host"""
    inputs: Annotated[str | None, Flag("WHERE")] = None
    """inputs of checkpointed blocks: float32, bf16, host or host_bf16"""
    host: Annotated[str | None, Flag("SIZE")] = None
    """memory of a machine beside its cards, such as 64GB (default: enough)"""
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
    if flags.checkpoint is not None:
        flags = replace(flags, checkpoint=find_checkpoint(flags.checkpoint))
    sys.stdout.write(_report(flags, how, training) + "\n")


def _report(flags: ClipFlags, how: GenerationFlags, training: TrainingFlags) -> str:
    """What was asked for, in words. What needs no torch is checked first."""
    from talkingdit.plan.cards import card_of

    seconds = _seconds(how)
    card, stated = card_of(flags.card)
    speed = flags.tflops or stated
    if flags.preset is None:
        assert flags.checkpoint is not None
        family = families.of_folder(flags.checkpoint)
        config = family.cost.read_config(flags.checkpoint)
    else:
        family = families.of_preset(flags.preset)
        config = family.presets[flags.preset]

    from talkingdit.plan.transformer import Transformer

    transformer = Transformer.of(family, config)
    try:
        clip = _clip(flags, how, family.cost.default_clip(transformer.config, flags.checkpoint))
        if training.train:
            return _train(training, transformer, clip, card, speed)
        return _generate(flags, how, transformer, clip, card, speed, seconds)
    except ValueError as error:
        raise UserError(f"{str(error).removesuffix('.')}.") from error


def _seconds(how: GenerationFlags) -> float | None:
    """Of the voice that is planned for, if there is one."""
    if how.audio is None:
        return how.seconds
    from talkingdit.media.files import SPEECH_RATE
    from talkingdit.pipelines.inputs import voice_blocks

    return sum(len(block) for block in voice_blocks(how.audio)) / SPEECH_RATE


def _clip(flags: ClipFlags, how: GenerationFlags, default: ClipShape) -> ClipShape:
    """The family's usual clip with what was said about it."""
    height, width = flags.size or (default.height, default.width)
    steps = how.steps or default.steps
    interval = read_interval(how.guidance_interval)
    guided = None
    if interval != ALL_STEPS:
        if default.branches == 1:
            raise UserError("plan: --guidance-interval says nothing here: the model makes one prediction per step.")
        guided = sum(Interval(1.0, *interval, outside=0.0)(step, steps) > 0 for step in range(steps))
    return replace(
        default,
        height=height,
        width=width,
        latents=default.latents if flags.frames is None else latents_of(flags.frames),
        steps=steps,
        branches=1 if how.plain else default.branches,
        batched=not how.sequential and not how.plain and default.branches > 1,
        pose=flags.pose,
        guided=guided,
    )


def _generate(
    flags: ClipFlags,
    how: GenerationFlags,
    transformer: Transformer,
    clip: ClipShape,
    card: float,
    speed: float | None,
    seconds: float | None,
) -> str:
    import torch

    from talkingdit.pipelines.memory import Memory
    from talkingdit.plan.generation import GenerationPlan, advice, hear, predict, weigh
    from talkingdit.plan.report import generation_report

    memory = Memory.parse(how.memory)
    if how.precision is not None:
        memory = replace(memory, precision=how.precision)
    weights = weigh(transformer, getattr(torch, how.dtype), flags.checkpoint)

    voice = None if seconds is None else hear(transformer, clip, seconds, flags.checkpoint)

    def again(memory: Memory, clip: ClipShape) -> GenerationPlan:
        return predict(transformer, weights, clip, memory, speed, voice)

    found = again(memory, clip)
    return generation_report(found, card, speed, advice(found, again, card, transformer.cost.SWITCHES))


def _train(flags: TrainingFlags, transformer: Transformer, clip: ClipShape, card: float, speed: float | None) -> str:
    from talkingdit.plan.cards import card_of
    from talkingdit.plan.report import training_report
    from talkingdit.plan.run import Cluster, TrainingRun, measured
    from talkingdit.plan.training import best

    if speed is None:
        raise UserError("plan: --train needs the speed of the card: name one with --card, or give --tflops.")
    cluster = Cluster(flags.nodes, flags.gpus, card, speed)
    links: Any = {name: 1e9 * value for name in ("inside", "between") if (value := getattr(flags, name))}
    cluster = replace(cluster, **links)
    if flags.host is not None:
        cluster = replace(cluster, host=card_of(flags.host)[0])
    if flags.measured is not None:
        cluster = measured(cluster, flags.measured)
    chosen: dict[str, Any] = {"optimizer": flags.optimizer, "checkpointing": flags.checkpointing}
    chosen |= {"frozen": flags.frozen, "swap": flags.swap, "inputs": flags.inputs}
    chosen |= {"averages": False if flags.no_averages else None, "offload": flags.offload or None}
    given = {name: value for name, value in chosen.items() if value is not None}
    run = TrainingRun(
        clip, flags.micro_batches or flags.nodes, trains=flags.train_only or "all", lora_rank=flags.lora_rank, **given
    )
    found, fits = best(transformer, run, cluster, frozenset(given))
    return training_report(found, fits, transformer, cluster, flags.measured)
