# SPDX-License-Identifier: Apache-2.0
"""`talkingdit plan`: what generating takes on a card or, with `--train`, what training takes on a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from talkingdit.plan.clip import ClipShape
    from talkingdit.plan.transformer import Transformer


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
        help="predict memory and time of a checkpoint on a card, or of its training on a cluster",
        description="Predict the memory and time that a clip of a checkpoint takes, without loading it, and "
        "say what to switch on if it does not fit. With --train: that of training it, and the fastest parallel layout.",
    )
    plan.set_defaults(run=_plan)
    what = plan.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", metavar="DIR", help="folder of the checkpoint")
    what.add_argument("--preset", metavar="NAME", help="a configuration by name, such as wan_s2v_14b")
    plan.add_argument("--size", type=sides, metavar="WxH", help="of the frames (of the family: 832x448, 96x96)")
    plan.add_argument(
        "--card", default="24GB", metavar="CARD", help="memory such as 24GB, or a name such as h100 (24GB)"
    )
    plan.add_argument("--tflops", type=strength, metavar="T", help="stated bfloat16 speed of the card, for the time")
    plan.add_argument("--frames", type=count, metavar="N", help="per clip (of the family or checkpoint)")
    plan.add_argument("--pose", action="store_true", help="with a pose video")

    make = plan.add_argument_group("generating")
    make.add_argument("--steps", type=count, metavar="N", help="denoising steps per clip (of the family or checkpoint)")
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
    from talkingdit import families
    from talkingdit.errors import UserError
    from talkingdit.plan.cards import card_of

    card, speed = card_of(args.card)
    speed = args.tflops or speed
    folder = Path(args.checkpoint) if args.checkpoint else None
    family = families.of_preset(args.preset) if folder is None else families.of_folder(folder)

    from talkingdit.plan.transformer import Transformer

    config = family.presets[args.preset] if folder is None else family.cost.read_config(folder)
    transformer = Transformer.of(family, config)
    try:
        clip = _clip(args, family.cost.default_clip(transformer.config, folder))
        if args.train:
            print(_train(args, transformer, clip, card, speed))
        else:
            print(_generate(args, transformer, clip, card, speed))
    except ValueError as error:
        raise UserError(f"{error}.") from error


def _clip(args: argparse.Namespace, default: ClipShape) -> ClipShape:
    """The family's usual clip with what was said about it."""
    from talkingdit.plan.clip import latents_of

    height, width = args.size or (default.height, default.width)
    return replace(
        default,
        height=height,
        width=width,
        latents=default.latents if args.frames is None else latents_of(args.frames),
        steps=args.steps or default.steps,
        branches=1 if args.plain else default.branches,
        batched=not args.sequential and not args.plain and default.branches > 1,
        pose=args.pose,
    )


def _generate(
    args: argparse.Namespace, transformer: Transformer, clip: ClipShape, card: float, speed: float | None
) -> str:
    import torch

    from talkingdit.pipelines.memory import Memory
    from talkingdit.plan.generation import Plan, advice, predict, weigh
    from talkingdit.plan.report import generation_report

    memory = Memory.parse(args.memory)
    weights = weigh(transformer, getattr(torch, args.dtype), Path(args.checkpoint) if args.checkpoint else None)

    def again(memory: Memory, clip: ClipShape) -> Plan:
        return predict(transformer, weights, clip, memory, speed)

    found = again(memory, clip)
    return generation_report(found, card, speed, advice(found, again, card, transformer.cost.SWITCHES))


def _train(
    args: argparse.Namespace, transformer: Transformer, clip: ClipShape, card: float, speed: float | None
) -> str:
    from talkingdit.errors import UserError
    from talkingdit.plan.report import training_report
    from talkingdit.plan.run import Cluster, Run, measured
    from talkingdit.plan.training import best

    if speed is None:
        raise UserError("plan: --train needs the speed of the card: name one with --card, or give --tflops.")
    cluster = Cluster(args.nodes, args.gpus, card, speed)
    links: Any = {name: 1e9 * getattr(args, name) for name in ("inside", "between") if getattr(args, name)}
    cluster = replace(cluster, **links)
    if args.measured is not None:
        cluster = measured(cluster, args.measured)
    chosen = {"optimizer": args.optimizer, "checkpointing": args.checkpointing}
    chosen |= {"averages": False if args.no_averages else None, "offload": args.offload or None}
    given = {name: value for name, value in chosen.items() if value is not None}
    run = Run(
        clip, args.micro_batches or args.nodes, trains=args.train_only or "all", lora_rank=args.lora_rank, **given
    )
    found, fits = best(transformer, run, cluster, frozenset(given))
    return training_report(found, fits, transformer, cluster, args.measured)
