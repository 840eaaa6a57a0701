# SPDX-License-Identifier: Apache-2.0
"""What a video will take, before it is made: memory by prediction, time by the card's speed or by earlier runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from talkingdit.app.asked import Asked, Machine, options_of
from talkingdit.app.runs import Run
from talkingdit.errors import UserError


def plan(asked: Asked, folder: Path, machine: Machine, before: Sequence[Run] = ()) -> str:
    """A plan in words.

    Args:
        asked: what would be made; its voice may be missing.
        folder: of its files.
        before: earlier runs, whose time per step is told.

    Raises:
        UserError: something is wrong with what was asked for.
    """
    import torch

    from talkingdit.pipelines.memory import Memory
    from talkingdit.plan.generation import advice, hear, predict, weigh
    from talkingdit.plan.report import generation_report
    from talkingdit.plan.transformer import Transformer

    family, source = asked.family(), asked.folder
    options = options_of(family, asked.options, folder)
    on_gpu = torch.cuda.is_available() and not options.small and (machine.device or "cuda").startswith("cuda")
    card, speed, where = _card(on_gpu)
    dtype = getattr(torch, machine.dtype or ("bfloat16" if on_gpu else "float32"))
    try:
        transformer = Transformer.of(family, family.cost.read_config(source))
        clip = family.cost.default_clip(transformer.config, source)
        size = getattr(options, "size", None) or (clip.height, clip.width)
        clip = replace(clip, height=size[0], width=size[1], steps=options.steps or clip.steps)
        clip = replace(clip, batched=clip.batched and not getattr(options, "sequential", False))
        memory = Memory.parse(getattr(options, "memory", ""))
        if machine.precision is not None:
            memory = replace(memory, precision=machine.precision)
        weights = weigh(transformer, dtype, source)
        seconds = _seconds(asked, options, folder)
        voice = None if seconds is None else hear(transformer, clip, seconds, source)

        def again(memory: Any, clip: Any) -> Any:
            return predict(transformer, weights, clip, memory, speed, voice)

        found = again(memory, clip)
        better = advice(found, again, card, transformer.cost.SWITCHES)
        words = generation_report(found, card, speed, better)
    except ValueError as error:
        raise UserError(f"{str(error).removesuffix('.')}.") from error
    lines = [line for line in words.splitlines() if speed is not None or not line.startswith("time ")]
    per_step = _per_step(asked, before)
    if per_step is not None:
        clips = 1 if voice is None else voice.clips
        lines.append(
            f"time        about {per_step * clip.steps * clips:.0f} s, as the last run took {per_step:.2f} s a step"
        )
    return "\n".join([f"on          {where}", *lines])


def _card(on_gpu: bool) -> tuple[float, float | None, str]:
    """Bytes, TFLOP/s where they are known, and the name of what computes."""
    import os

    import torch

    from talkingdit.plan.cards import CARDS

    if not on_gpu:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return float(memory), None, "the processor, whose memory is what is called the card below"
    properties = torch.cuda.get_device_properties(0)
    plain = properties.name.lower().replace(" ", "").replace("-", "")
    speed = next((speed for name, (_, speed) in CARDS.items() if name.partition("-")[0] in plain), None)
    return float(properties.total_memory), speed, properties.name


def _seconds(asked: Asked, options: Any, folder: Path) -> float | None:
    """Of the longest voice; None where there is none yet."""
    from talkingdit.media.files import SPEECH_RATE
    from talkingdit.pipelines.inputs import voice_blocks

    paths = [folder / asked.audio] if asked.audio else options.voices()
    lengths = [sum(len(block) for block in voice_blocks(path)) / SPEECH_RATE for path in paths]
    return max(lengths, default=None)


def _per_step(asked: Asked, before: Sequence[Run]) -> float | None:
    """Seconds that a step of the last whole run of the same model took, all else in it."""
    size = asked.options.get("size")
    for run in before:
        same = run.asked.checkpoint == asked.checkpoint and run.asked.options.get("size") == size
        if same and run.state == "done" and run.total and run.took:
            return run.took / run.total
    return None
