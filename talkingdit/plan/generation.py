# SPDX-License-Identifier: Apache-2.0
"""What generating a clip will take, before anything is loaded: memory of every phase, and time.

Memory is added up from the architecture: weights from a model without storage, the rest from a family's formulas of
what is alive at the worst moment of each phase. Tests hold them against a count of all live tensors while the real code
runs (docs/memory.md). Time is the number of floating point operations by an assumed speed of the card: an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.encoders.speech import OVERLAP_SECONDS, WHOLE_SECONDS
from talkingdit.nn.units import Unit, large_prefixes, unit_of
from talkingdit.pipelines.memory import Memory
from talkingdit.plan.cards import EFFICIENCY, EIGHT_BIT_SPEED, HOST_TO_DEVICE, needed
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.cost import TEXT_ENCODER, FrozenParts
from talkingdit.plan.transformer import Transformer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights.

    Args:
        transformer: of every parameter.
        frozen: of what stands beside it.
        size: of an element of the transformer, and of what it computes.
    """

    transformer: Mapping[str, int]
    frozen: FrozenParts
    size: int


@dataclass(frozen=True)
class VoicePlan:
    """What a voice takes, and what its length makes of a video.

    Args:
        seconds: of the voice.
        hearing: bytes on the card while the speech encoder hears it.
        features: bytes of its features: on the disk where the voice is heard in windows, else in the host's memory.
        clips: of the video.
    """

    seconds: float
    hearing: float
    features: float
    clips: int

    @property
    def windows(self) -> int:
        """In how many windows it is heard; 1 is whole."""
        return max(1, math.ceil((self.seconds - OVERLAP_SECONDS) / (WHOLE_SECONDS - OVERLAP_SECONDS)))


@dataclass(frozen=True)
class GenerationPlan:
    """A prediction, in bytes and seconds."""

    weights: dict[str, float]  # by part, what stays on the card
    conditions: float  # what is kept for all steps of a clip
    phases: dict[str, float]  # what each phase needs at its worst moment beyond the weights
    flops_per_step: float  # of all branches
    seconds_per_clip: float | None
    memory: Memory
    clip: ClipShape
    voice: VoicePlan | None = None

    @property
    def peak(self) -> float:
        """Bytes alive at the worst moment."""
        return sum(self.weights.values()) + max(self.phases.values())

    @property
    def needed(self) -> float:
        """Bytes that a card should have: the peak, the allocator's losses and the driver's context."""
        return needed(self.peak)


def weigh(transformer: Transformer, dtype: torch.dtype, folder: Path | None = None) -> WeightBytes:
    """Bytes of all weights.

    Args:
        dtype: in which the transformer computes.
        folder: of a checkpoint; what it does not tell, and all without one, is that of the family's released model.
    """
    frozen = transformer.cost.frozen_parts(transformer.config, dtype, folder)
    return WeightBytes(transformer.bytes(dtype), frozen, dtype.itemsize)


def hear(transformer: Transformer, clip: ClipShape, seconds: float, folder: Path | None = None) -> VoicePlan:
    """What a voice of so many seconds takes.

    Args:
        folder: of the checkpoint, if there is one.
    """
    cost = transformer.cost.speech(transformer.config, folder)
    return VoicePlan(
        seconds=seconds,
        hearing=cost.hearing * min(seconds, WHOLE_SECONDS),
        features=cost.features * seconds,
        clips=math.ceil(seconds * cost.fps / clip.frames),
    )


def predict(
    transformer: Transformer,
    weights: WeightBytes,
    clip: ClipShape,
    memory: Memory | None = None,
    tflops: float | None = None,
    voice: VoicePlan | None = None,
) -> GenerationPlan:
    """Memory and time of a clip.

    Args:
        weights: from `weigh`.
        clip, memory: what to generate, and how.
        tflops: dense TFLOP/s that the card is said to reach; None leaves time out.
        voice: from `hear`; None leaves the speech encoder's work out.

    Raises:
        ValueError: the model does not take what the clip has.
    """
    config, cost = transformer.config, transformer.cost
    memory = Memory() if memory is None else memory
    conditions = cost.conditions(config, clip, memory, weights.size)
    denoise = conditions + cost.step(config, clip, memory, weights.size)
    phases = {"denoise": denoise, **cost.autoencoder(config, clip, memory, weights.frozen.width)}
    if voice is not None and voice.hearing:
        phases["speech"] = voice.hearing
    one = transformer.flops(clip, memory)

    def step(branches: int, tflops: float) -> float:
        """Seconds of a step with so many predictions."""
        timed = branches * one
        if memory.precision != "native":
            attention = branches * cost.attention_flops(config, clip)
            timed = attention + (timed - attention) / EIGHT_BIT_SPEED
        seconds = timed / (tflops * 1e12 * EFFICIENCY)
        if memory.offload != "none":
            forwards = 1 if clip.batched else branches
            moved = _resident(transformer, weights, replace(memory, offload="none"))["transformer"]
            seconds = max(seconds, forwards * moved / HOST_TO_DEVICE)
        return seconds

    seconds = None
    if tflops is not None:
        guided = clip.steps if clip.guided is None else clip.guided
        seconds = guided * step(clip.branches, tflops) + (clip.steps - guided) * step(1, tflops)
    return GenerationPlan(
        _resident(transformer, weights, memory),
        conditions,
        phases,
        clip.branches * one,
        seconds,
        memory,
        clip,
        voice,
    )


def _resident(transformer: Transformer, weights: WeightBytes, memory: Memory) -> dict[str, float]:
    """Weights on the card by part."""
    units = transformer.units.UNITS
    large = large_prefixes(units)
    sizes = dict(weights.transformer)
    if memory.weights != "native":
        cast = memory.weights == "cast_fp8"  # which narrows all layers that are not precise; quantising, large matrices
        kinds = ("weight", "bias") if cast else ("weight",)
        for name in sizes:
            narrow = name.startswith(large) and name.endswith(kinds) and "norm" not in name
            if narrow or (cast and name.startswith(transformer.cost.CAST)):
                sizes[name] //= weights.size
    if memory.precision != "native":
        for name, (shape, _) in transformer.parameters.items():
            if name.startswith(large) and name.endswith(".weight") and len(shape) == 2:
                sizes[name] = math.prod(shape) + 4 * shape[0]  # codes, and a scale for every output
    total = float(sum(sizes.values()))
    if memory.offload != "none":
        moved = _moved(sizes, units, memory.offload)
        total += 2 * max(moved) - sum(moved)  # one at work, one on its way
    if memory.weights == "cast_fp8":
        # One layer at a time is widened.
        total += max(value for name, value in weights.transformer.items() if name.startswith(large))
    frozen = dict(weights.frozen.sizes)
    if memory.text_encoder == "cpu":
        frozen[TEXT_ENCODER] = 0
    return {"transformer": total, **{name: float(value) for name, value in frozen.items()}}


def _moved(sizes: Mapping[str, int], units: Sequence[Unit], offload: str) -> list[int]:
    """Bytes of what offloading moves at a time: large units, or the parameters of one layer."""
    groups: dict[str, int] = {}
    for name, value in sizes.items():
        path, unit = unit_of(name, units)
        large = unit is not None and unit.large
        if offload == "block" and not large:
            continue  # stays
        key = path if offload == "block" else name.rpartition(".")[0]
        groups[key] = groups.get(key, 0) + value
    return list(groups.values())


def advice(
    plan: GenerationPlan,
    again: Callable[[Memory, ClipShape], GenerationPlan],
    card: float,
    switches: Sequence[Mapping[str, Any]],
) -> GenerationPlan | None:
    """A prediction that fits a card, with as few switches as that takes; None if none does.

    Args:
        plan: what was asked for.
        again: makes a prediction.
        card: bytes.
        switches: that may be changed, in the order to try them: `Cost.SWITCHES`.
    """
    clip = replace(plan.clip, batched=False)
    memory = plan.memory
    found = again(memory, clip)
    for change in switches:
        if found.needed <= card:
            break
        if "weights" in change and memory.weights != "native":
            continue
        memory = replace(memory, **change)
        found = again(memory, clip)
    if found.needed > card:
        return None
    for change in switches:
        without = replace(memory, **{name: getattr(plan.memory, name) for name in change})
        if without != memory and again(without, clip).needed <= card:
            memory = without
    return again(memory, clip)
