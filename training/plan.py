# SPDX-License-Identifier: Apache-2.0
"""What a configuration will take, before any machine is asked for: `python -m training.plan --config FILE`.

    python -m training.plan --config training/configs/wan_s2v.toml --card h100 --gpus 8 [--optim.name adamw8bit ...]

The formulas are those of `talkingdit plan --train`; layout and switches are the configuration's. Of several stages the
one that takes most is told.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from talkingdit.errors import UserError
from talkingdit.plan.cards import card_of
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.report import training_report
from talkingdit.plan.run import OPTIMIZERS, Cluster, MeshSizes, TrainingRun
from talkingdit.plan.training import TrainPlan, predict
from talkingdit.plan.transformer import Transformer
from talkingdit.plan.units import unit_sizes
from training.config import Config, parse
from training.family import family_of, settings_of
from training.parallel import mesh_sizes
from training.sections import StageConfig
from training.signals import run_guarded
from training.stages import matches

SHAPES = ((9, 16), (3, 4), (1, 1))  # sides of the frames that are tried, to fill a budget of tokens
SIDE = 16  # pixels, of which sides are multiples


def transformer_of(config: Config) -> Transformer:
    """The transformer that a configuration trains; nothing is loaded."""
    return Transformer.of(family_of(config), settings_of(config))


def planned(config: Config, cluster: Cluster, transformer: Transformer) -> tuple[StageConfig, TrainPlan]:
    """The stage that takes most of a card, and what it takes.

    Args:
        transformer: from `transformer_of`.

    Raises:
        UserError: the layout is not one of so many GPUs.
    """
    found = [(stage, predict_stage(config, stage, transformer, cluster)) for stage in config.stages]
    return max(found, key=lambda pair: pair[1].needed)


def predict_stage(config: Config, stage: StageConfig, transformer: Transformer, cluster: Cluster) -> TrainPlan:
    """What a stage takes, with the layout and the switches of the configuration."""
    mesh = MeshSizes(**mesh_sizes(config.parallel, cluster.world))
    run = run_of(config, stage, transformer)
    return predict(transformer, unit_sizes(transformer, run), run, cluster, mesh)


def run_of(config: Config, stage: StageConfig, transformer: Transformer) -> TrainingRun:
    """A stage as plans know it. What trains besides everything, adapters and the family's own parts is planned as
    everything."""
    known = stage.optim.name if stage.optim.name in OPTIMIZERS else "adamw"
    return TrainingRun(
        clip_of(config, stage, transformer),
        stage.batch.count,
        optimizer="adamw" if known == "muon" and stage.optim.muon_lr == 0 else known,
        checkpointing=config.parallel.activation_checkpointing,
        averages=any(other.optim.ema > 0 for other in config.stages),
        frozen=config.model.frozen,
        swap=config.model.swap,
        inputs=config.parallel.inputs,
        offload=config.parallel.offload,
        asynchronous=config.checkpoint.asynchronous,
        validates=config.sample.every > 0,
        trains=_trains(config, stage, transformer),
        lora_rank=config.lora.rank or 32,
        float8=config.parallel.float8,
    )


def _trains(config: Config, stage: StageConfig, transformer: Transformer) -> str:
    if config.lora.rank > 0 and all("lora_" in pattern for pattern in stage.train):
        return "lora"
    trained = {name for name in transformer.parameters if matches(name, stage.train)}
    trained -= {name for name in trained if matches(name, stage.freeze)}
    for part, prefixes in transformer.cost.SUBSETS.items():
        if trained and trained == {name for name in transformer.parameters if name.startswith(prefixes)}:
            return part
    return "all"


def clip_of(config: Config, stage: StageConfig, transformer: Transformer) -> ClipShape:
    """The largest clip that a micro-batch may hold: of all lengths and shapes the one that fills the budget best.

    Without a budget it is a stack of clips of the family's usual size.
    """
    usual = transformer.cost.default_clip(transformer.config)
    plain = replace(usual, branches=1, batched=False, steps=1, pose=bool(transformer.config.get("cond_dim")))
    lengths = stage.batch.frames or [config.model.clip_latents]
    if stage.batch.tokens <= 0:
        return replace(plain, latents=stage.batch.size * max(lengths))  # a stack takes what as many tokens in a row do
    fitting = [clip for latents in lengths for clip in _fitting(replace(plain, latents=latents), stage, transformer)]
    if not fitting:
        raise UserError(
            f"stages.{stage.name}.batch.tokens: {stage.batch.tokens} hold no clip of {min(lengths)} latents."
        )
    return max(fitting, key=lambda clip: transformer.tokens(clip)[1])


def _fitting(clip: ClipShape, stage: StageConfig, transformer: Transformer) -> Iterator[ClipShape]:
    """For every shape of frames the largest that the budget holds."""
    for rows, columns in SHAPES:
        best = None
        for height in range(SIDE, 2048, SIDE):
            tried = replace(clip, height=height, width=max(SIDE, height * columns // rows // SIDE * SIDE))
            if transformer.tokens(tried)[1] > stage.batch.tokens:
                break
            best = tried
        if best is not None:
            yield best


def _options(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options of this command, and those of the configuration."""
    mine, rest = {"card": "h100", "gpus": "8", "nodes": "1", "tflops": ""}, list(arguments)
    for name in mine:
        if f"--{name}" in rest:
            at = rest.index(f"--{name}")
            if at + 1 >= len(rest):
                raise UserError(f"--{name}: expected a value, got none.")
            mine[name] = rest[at + 1]
            del rest[at : at + 2]
    return mine, rest


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--{name}: expected a whole number of at least 1, got {text!r}.")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what a configuration takes.

    Raises:
        UserError: something that the user can correct.
    """
    mine, rest = _options(sys.argv[1:] if arguments is None else arguments)
    try:
        config = parse(rest)
        memory, stated = card_of(mine["card"])
        speed: Any = float(mine["tflops"]) if mine["tflops"] else stated
        if speed is None:
            raise UserError("--card: its speed is not known; name one, or give --tflops.")
        cluster = Cluster(_number("nodes", mine["nodes"]), _number("gpus", mine["gpus"]), memory, speed)
        transformer = transformer_of(config)
        stage, plan = planned(config, cluster, transformer)
    except ValueError as error:
        raise UserError(str(error)) from error
    sys.stdout.write(f"stage       {stage.name}, the one that takes most\n")
    sys.stdout.write(training_report(plan, plan.needed <= cluster.memory, transformer, cluster, given=True) + "\n")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
