# SPDX-License-Identifier: Apache-2.0
"""`talkingdit plan`: what generating takes on a card or, with `--train`, what training takes on a cluster."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from talkingdit.plan.generation import ClipShape
    from talkingdit.plan.training import Cluster, TrainPlan

_CONSTANTS = ("efficiency", "inside", "between")


def add_plan(
    verbs: Any, count: Callable[[str], int], strength: Callable[[str], float], sides: Callable[[str], tuple[int, int]]
) -> None:
    """Add the verb and its arguments.

    Args:
        verbs: of the command line.
        count, strength, sides: read a number of at least 1, one of at least 0, and WIDTHxHEIGHT as (height, width).
    """
    plan = verbs.add_parser(
        "plan",
        help="predict memory and time of a Wan-S2V checkpoint on a card, or of its training on a cluster",
        description="Predict the memory and time that a clip of a Wan-S2V checkpoint takes, without loading it, and "
        "say what to switch on if it does not fit. With --train: that of training it, and the fastest parallel layout.",
    )
    plan.set_defaults(run=_plan)
    what = plan.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", metavar="DIR", help="folder of the checkpoint")
    what.add_argument("--preset", metavar="NAME", help="a configuration by name, such as wan_s2v_14b")
    plan.add_argument("--size", type=sides, default=(448, 832), metavar="WxH", help="of the pictures (832x448)")
    plan.add_argument(
        "--card", default="24GB", metavar="CARD", help="memory such as 24GB, or a name such as h100 (24GB)"
    )
    plan.add_argument("--tflops", type=strength, metavar="T", help="stated bfloat16 speed of the card, for the time")
    plan.add_argument("--frames", type=count, default=80, metavar="N", help="pictures per clip (80)")
    plan.add_argument("--pose", action="store_true", help="with a pose video")

    make = plan.add_argument_group("generating")
    make.add_argument("--steps", type=count, default=40, metavar="N", help="denoising steps per clip (40)")
    make.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (bfloat16)")
    make.add_argument("--sequential", action="store_true", help="one prediction of guidance after the other")
    make.add_argument("--plain", action="store_true", help="no guidance: one prediction per step")
    make.add_argument("--memory", default="", metavar="SWITCHES", help="e.g. offload=block,text_encoder=cpu")

    train = plan.add_argument_group("training", "switches that are not given are chosen so that it fits")
    train.add_argument("--train", action="store_true", help="plan training")
    train.add_argument("--gpus", type=count, default=8, metavar="N", help="per node (8)")
    train.add_argument("--nodes", type=count, default=1, metavar="N", help="machines (1)")
    train.add_argument("--micro-batches", type=count, metavar="N", help="per step, on all GPUs together (one per node)")
    train.add_argument("--optimizer", metavar="NAME", help="adamw, adamw8bit or muon")
    train.add_argument("--checkpointing", metavar="MODE", help="of activations: full, selective or off")
    train.add_argument("--no-averages", action="store_true", help="without running averages of the weights")
    train.add_argument("--offload", action="store_true", help="shards, gradients and optimiser states on the host")
    train.add_argument("--train-only", metavar="PART", help="lora (adapters on linear layers) or audio (its modules)")
    train.add_argument("--lora-rank", type=count, default=32, metavar="N", help="of the adapters (32)")
    train.add_argument("--inside", type=strength, metavar="GB/s", help="that a GPU sends within a node (300)")
    train.add_argument("--between", type=strength, metavar="GB/s", help="that a GPU sends to other nodes (40)")
    train.add_argument("--measured", type=Path, metavar="JSON", help="constants measured by bench/train_step.py")


def _plan(args: argparse.Namespace) -> None:
    import torch

    from talkingdit.errors import UserError
    from talkingdit.pipelines.memory import Memory
    from talkingdit.plan import generation as plan

    card, speed = plan.card_of(args.card)
    speed = args.tflops or speed
    dtype = getattr(torch, args.dtype)
    config, parts = plan.source(args.checkpoint or args.preset, dtype)
    height, width = args.size
    try:
        memory = Memory.parse(args.memory)
        if args.frames % 4:
            raise ValueError(f"plan: a clip must have a multiple of 4 pictures, got {args.frames}")
        clip = plan.ClipShape(
            height=height,
            width=width,
            latents=args.frames // 4,
            history=config["motion_frames"][1],
            steps=args.steps,
            branches=1 if args.plain else 2,
            batched=not args.sequential and not args.plain,
            pose=args.pose,
        )
        if args.train:
            print(_train(args, config, clip, card, speed))
            return
    except ValueError as error:
        raise UserError(f"{error}.") from error

    def again(memory: Memory, clip: plan.ClipShape) -> plan.Plan:
        return plan.predict(config, parts, clip, memory, dtype, speed)

    found = again(memory, clip)
    print(plan.report(found, card, speed, plan.advice(found, again, card)))


def _train(
    args: argparse.Namespace, config: Mapping[str, Any], clip: ClipShape, card: float, speed: float | None
) -> str:
    from talkingdit.errors import UserError
    from talkingdit.plan import training as plan_train

    if speed is None:
        raise UserError("plan: --train needs the speed of the card: name one with --card, or give --tflops.")
    cluster = plan_train.Cluster(args.nodes, args.gpus, card, speed)
    links: Any = {name: 1e9 * getattr(args, name) for name in ("inside", "between") if getattr(args, name)}
    cluster = replace(cluster, **links)
    if args.measured is not None:
        cluster = measured(cluster, args.measured)
    chosen = {"optimizer": args.optimizer, "checkpointing": args.checkpointing}
    chosen |= {"averages": False if args.no_averages else None, "offload": args.offload or None}
    given = {name: value for name, value in chosen.items() if value is not None}
    run = plan_train.Run(
        clip, args.micro_batches or args.nodes, trains=args.train_only or "all", lora_rank=args.lora_rank, **given
    )
    found, fits = plan_train.best(config, run, cluster, frozenset(given))
    return report(found, fits, config, cluster, args.measured)


def measured(cluster: Cluster, path: Path) -> Cluster:
    """The cluster with the constants of a file: {"constants": {"efficiency": 0.4, "inside": 3e11, "between": 4e10}}.

    Raises:
        UserError: no such file, or not of that form.
    """
    from talkingdit.errors import UserError

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
        f"clip        {clip.width} x {clip.height}, {4 * clip.latents} pictures: {total} tokens, {noisy} of them noisy",
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
