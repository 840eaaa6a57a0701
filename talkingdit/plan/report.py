# SPDX-License-Identifier: Apache-2.0
"""Predictions in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from talkingdit.encoders.speech import WHOLE_SECONDS
from talkingdit.plan.cards import EFFICIENCY, GB, SLACK
from talkingdit.plan.generation import GenerationPlan, VoicePlan
from talkingdit.plan.run import Cluster, TrainingRun
from talkingdit.plan.training import TrainPlan
from talkingdit.plan.transformer import Transformer


def size_in_words(value: float) -> str:
    """Bytes in GB, below 0.1 GB in MB."""
    return f"{value / GB:8.2f} GB" if value >= 0.1 * GB or not value else f"{value / 1e6:8.2f} MB"


def _work_in_words(flops: float) -> str:
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= 0.1 * scale:
            return f"{flops / scale:.2f} {unit}"
    return f"{flops / 1e9:.2f} GFLOP"


def _seconds_in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _time_in_words(seconds: float) -> str:
    """In a column."""
    return f"{seconds:8.2f} s" if seconds >= 0.005 else f"{1e3 * seconds:8.2f} ms"


def generation_report(plan: GenerationPlan, card: float, speed: float | None, better: GenerationPlan | None) -> str:
    """A prediction of a clip.

    Args:
        plan: from `generation.predict`.
        card, speed: bytes, and TFLOP/s where they are known.
        better: from `generation.advice`.
    """
    clip = plan.clip
    once = " in one pass" if clip.batched and clip.branches > 1 else ""
    inside = "" if clip.guided is None else f" in {clip.guided} of them, else 1"
    lines = [
        f"clip        {clip.width} x {clip.height}, {clip.frames} frames, {clip.steps} steps, "
        f"{clip.branches} prediction{'s' * (clip.branches > 1)} per step{once}{inside}",
        f"switches    {str(plan.memory) or 'none'}",
    ]
    lines += [] if plan.voice is None else _voice(plan.voice)
    lines += [f"{'weights':<12}{name:<16}{size_in_words(value)}" for name, value in plan.weights.items() if value]
    lines += [f"{'phase':<12}{name:<16}{size_in_words(value)}" for name, value in plan.phases.items()]
    lines.append(f"{'peak':<28}{size_in_words(plan.peak)}")
    lines.append(
        f"{'needed':<28}{size_in_words(plan.needed)} with the driver's context and {SLACK - 1:.0%} of fragmentation"
    )
    lines.append(f"{'card':<28}{size_in_words(card)}")
    lines.append(f"work        {_work_in_words(plan.flops_per_step)} per step")
    if plan.seconds_per_clip is not None:
        lines.append(
            f"time        about {_seconds_in_words(plan.seconds_per_clip)} of denoising per clip: an estimate from "
            f"{speed:.0f} TFLOP/s at {EFFICIENCY:.0%}, not measured"
        )
        if plan.voice is not None:
            hours = plan.voice.clips * plan.seconds_per_clip / 3600
            lines.append(f"{'':<12}{hours:.2g} h for the {plan.voice.clips} clips of the voice")
    else:
        lines.append("time        unknown: name a card, or give --tflops")
    return "\n".join([*lines, _verdict(plan, card, better)])


def _voice(voice: VoicePlan) -> Iterator[str]:
    """A voice, and where its features lie."""
    heard = "whole" if voice.windows == 1 else f"in {voice.windows} windows of {WHOLE_SECONDS} s"
    where = "in the host's memory" if voice.windows == 1 else "on the disk of the output"
    yield f"voice       {voice.seconds:.1f} s, heard {heard}: {voice.clips} clip{'s' * (voice.clips > 1)}"
    yield f"{'features':<28}{size_in_words(voice.features)} {where}"


def _verdict(plan: GenerationPlan, card: float, better: GenerationPlan | None) -> str:
    if plan.needed <= card:
        return "fits"
    if better is None:
        return "does not fit, with any switch: take a smaller size"
    words = [f"--memory {better.memory}"] if str(better.memory) else []
    if plan.clip.batched and plan.clip.branches > 1:
        words.append("--sequential")
    slower = ""
    if better.seconds_per_clip is not None:
        slower = f", about {_seconds_in_words(better.seconds_per_clip)} per clip"
    return f"does not fit; with {' '.join(words)} it needs {size_in_words(better.needed).strip()}{slower}"


def training_report(
    plan: TrainPlan,
    fits: bool,
    transformer: Transformer,
    cluster: Cluster,
    source: Path | None = None,
    given: bool = False,
) -> str:
    """A prediction of a training step.

    Args:
        plan, fits: from `training.best`.
        source: file of measured constants.
        given: the layout and its switches were given, and not chosen so that they fit.
    """
    lines = [
        *_what(plan, transformer, cluster),
        *_memory_and_traffic(plan, cluster),
        *_times(plan, transformer, cluster),
        *_constants(cluster, source),
    ]
    if fits:
        return "\n".join([*lines, "fits"])
    what = "this takes" if given else "the layout and switches that need least still take"
    lines.append(
        f"does not fit: {what} {plan.needed / GB:.2f} GB of the card's {cluster.memory / GB:.2f} GB; take "
        f"{_remedies(plan, given)}"
    )
    return "\n".join(lines)


def _remedies(plan: TrainPlan, given: bool) -> str:
    """What is left to try, without what is done already."""
    left = ["more GPUs", "a smaller or shorter clip"]
    if given:
        switches = (
            ("--parallel.activation-checkpointing full", plan.run.checkpointing == "full"),
            ("--optim.name adamw8bit", plan.run.optimizer == "adamw8bit"),
            ("--parallel.offload", plan.run.offload),
        )
        left += [words for words, done in switches if not done]
    if plan.run.averages:
        left.append("--optim.ema 0" if given else "--no-averages")
    if plan.run.trains != "lora":
        left.append("adapters (--lora.rank 32)" if given else "--train-only lora")
    return f"{', '.join(left[:-1])}, or {left[-1]}"


def _what(plan: TrainPlan, transformer: Transformer, cluster: Cluster) -> Iterator[str]:
    run, clip = plan.run, plan.run.clip
    noisy, total = transformer.tokens(clip)
    gpus = f"{cluster.nodes} x {cluster.gpus} GPUs" if cluster.nodes > 1 else f"{cluster.gpus} GPUs"
    yield f"clip        {clip.width} x {clip.height}, {clip.frames} frames: {total} tokens, {noisy} of them noisy"
    yield f"step        {run.micro_batches} micro-batch{'es' * (run.micro_batches > 1)} of a clip on {gpus}"
    yield f"trains      {_trained(run, transformer)}{'' if run.averages else ', without averages of the weights'}"
    yield f"layout      {plan.mesh}"
    yield (
        f"switches    --parallel.activation-checkpointing {run.checkpointing} --optim.name {run.optimizer} "
        f"--batch.count {run.micro_batches}{' --parallel.offload' if run.offload else ''}"
        f"{f' --parallel.inputs {run.inputs}' if run.inputs != 'float32' else ''}"
        f"{f' --parallel.float8 {run.float8}' if run.float8 != 'off' else ''}"
        f"{f' --model.frozen {run.frozen}' if run.frozen != 'float32' else ''}"
        f"{f' --model.swap {run.swap}' if run.swap else ''}"
        f"{f' --lora.rank {run.lora_rank}' if run.trains == 'lora' else ''}{'' if run.averages else ' --optim.ema 0'}"
    )


def _trained(run: TrainingRun, transformer: Transformer) -> str:
    if run.trains == "all":
        return "all parameters"
    if run.trains == "lora":
        return f"adapters of rank {run.lora_rank}"
    return " and ".join(prefix.rstrip(".") for prefix in transformer.cost.SUBSETS[run.trains])


def _memory_and_traffic(plan: TrainPlan, cluster: Cluster) -> Iterator[str]:
    for name, value in plan.memory.items():
        if value > min(5e6, 1e-3 * plan.peak):
            yield f"{'memory':<12}{name:<30}{size_in_words(value)}"
    for name, value in plan.margins.items():
        if value:
            yield f"{'margin':<12}{name:<30}{size_in_words(value)}"
    if plan.validation:
        while_validating = size_in_words(sum(plan.validation.values()))
        yield f"{'memory':<12}{'all, while validating':<30}{while_validating}, with both weights and averages"
    yield f"{'needed':<42}{size_in_words(plan.needed)} with the driver's context and fragmentation"
    yield f"{'card':<42}{size_in_words(cluster.memory)}"
    for name, value in plan.host.items():
        yield f"{'host':<12}{name:<30}{size_in_words(value * cluster.gpus)} of memory per node"
    for name, sent in plan.sent.items():
        if sent.bytes:
            outside = f", {size_in_words(sent.outside).strip()} of them to other nodes" if sent.outside else ""
            yield f"{'sent':<12}{name:<30}{size_in_words(sent.bytes)} per GPU and step{outside}"


def _times(plan: TrainPlan, transformer: Transformer, cluster: Cluster) -> Iterator[str]:
    total = transformer.tokens(plan.run.clip)[1] * plan.run.micro_batches
    for name, value in plan.seconds.items():
        if value >= min(5e-3, 1e-2 * plan.step_seconds):
            yield f"{'time':<12}{name:<30}{_time_in_words(value)}"
    used = plan.flops / plan.step_seconds / cluster.world / (cluster.tflops * 1e12)
    yield (
        f"{'step':<42}{_time_in_words(plan.step_seconds)}, {total / plan.step_seconds:.0f} tokens/s, "
        f"{used:.0%} of the stated speed: an estimate, not a measurement"
    )


def _constants(cluster: Cluster, source: Path | None) -> Iterator[str]:
    constants = {
        "efficiency": f"{cluster.efficiency:.0%} of {cluster.tflops:.0f} TFLOP/s while it computes",
        "inside": f"{cluster.inside / 1e9:.0f} GB/s within a node",
        "between": f"{cluster.between / 1e9:.0f} GB/s per GPU between nodes",
    }
    for name, words in constants.items():
        origin = f"measured ({source})" if name in cluster.measured else "assumed"
        yield f"{'constant':<12}{words}: {origin}"
