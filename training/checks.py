# SPDX-License-Identifier: Apache-2.0
"""Whether the values of a configuration make sense, beyond their types."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from talkingdit import families
from training.sections import (
    CheckpointConfig,
    HeldOutConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Ramp,
    RunConfig,
    SampleConfig,
    SourceConfig,
    StageConfig,
)

KINDS = ("manifest", "shards", "precomputed")  # of sources that every family may train on


def _between(where: str, value: Ramp, low: float, high: float = float("inf")) -> None:
    for end in value if isinstance(value, tuple) else (value,):
        if not low <= end <= high:
            bounds = f"at least {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
            raise ValueError(f"{where} must be {bounds}, got {end:g}")


def check_finite(values: Any, where: str = "") -> None:
    """Whether no number of a table is NaN or infinite: TOML has words for those, and no schedule survives them.

    Raises:
        ValueError: with the key.
    """
    if isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{where} must be a finite number, got {values}")
    parts = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list | tuple) else ()
    )
    for key, value in parts:
        check_finite(value, f"{where}.{key}" if where else str(key))


def check_parallel(parallel: ParallelConfig) -> None:
    """Whether the switches of memory go together.

    Raises:
        ValueError: with the key.
    """
    if parallel.inputs != "float32" and parallel.activation_checkpointing == "off":
        raise ValueError(
            f'parallel.inputs = "{parallel.inputs}" says where inputs of checkpointed blocks wait, and '
            'parallel.activation_checkpointing is "off"'
        )
    _between("parallel.timeout_seconds", parallel.timeout_seconds, 1)


def check_model(model: ModelConfig) -> None:
    """Whether the numbers of the model make sense.

    Raises:
        ValueError: with the key.
    """
    for key in ("swap", "audio_context"):
        _between(f"model.{key}", getattr(model, key), 0)
    _between("model.clip_latents", model.clip_latents, 1)


def check_run(run: RunConfig, checkpoint: CheckpointConfig, log: LogConfig) -> None:
    """Whether the run's own numbers make sense.

    Raises:
        ValueError: with the key.
    """
    counted = (("run.threads", run.threads), ("checkpoint.every", checkpoint.every), ("log.every", log.every))
    for key, value in counted:
        _between(key, value, 1)
    for key, value in (("run.seed", run.seed), ("checkpoint.keep", checkpoint.keep)):
        _between(key, value, 0)


def _check_optim(optim: OptimConfig, where: str) -> None:
    for key in ("lr", "muon_lr", "weight_decay", "spike", "warmup_steps"):
        _between(f"{where}optim.{key}", getattr(optim, key), 0)
    _between(f"{where}optim.final", optim.final, 0, 1)
    for key in ("eps", "clip_norm"):
        if getattr(optim, key) <= 0:
            raise ValueError(f"{where}optim.{key} must be over 0, got {getattr(optim, key):g}")
    for key, value in (("ema", optim.ema), *((f"betas.{i}", beta) for i, beta in enumerate(optim.betas))):
        if not 0 <= value < 1:
            raise ValueError(f"{where}optim.{key} must be at least 0 and less than 1, got {value:g}")
    for pattern, factor in optim.lr_scale.items():
        _between(f"{where}optim.lr_scale.{pattern}", factor, 0)


def check_sample(sample: SampleConfig) -> None:
    """Whether the validation makes sense.

    Raises:
        ValueError: with the key.
    """
    for key, value in (("steps", sample.steps), ("clips", sample.clips), ("max_area", sample.max_area)):
        _between(f"sample.{key}", value, 1)
    if sample.seconds <= 0:
        raise ValueError(f"sample.seconds must be over 0, got {sample.seconds:g}")
    if (sample.cases is None) != (sample.encoders is None):
        only = "cases" if sample.encoders is None else "encoders"
        raise ValueError(f"sample.cases and sample.encoders go together, got only {only}")
    if sample.cases is not None and sample.text_guidance != sample.audio_guidance:
        raise ValueError(
            "sample.text_guidance and sample.audio_guidance must be equal with sample.cases, for Wan-S2V is guided by "
            f"both together, got {sample.text_guidance:g} and {sample.audio_guidance:g}"
        )


def check_sources(sources: Mapping[str, SourceConfig]) -> None:
    """Whether there are sources of these kinds.

    Raises:
        ValueError: with the key.
    """
    known = [*(kind for name in families.names() for kind in families.get(name).sources), *KINDS]
    for name, source in sources.items():
        if source.kind not in known:
            kinds = ", ".join(map(repr, known))
            raise ValueError(f"data.sources.{name}.kind must be one of {kinds}, got {source.kind!r}")


def check_held_out(held_out: HeldOutConfig, sources: Mapping[str, SourceConfig]) -> None:
    """Whether there is something to measure the held-out loss on.

    Raises:
        ValueError: with the key.
    """
    _between("held_out.every", held_out.every, 0)
    _between("held_out.clips", held_out.clips, 1)
    if not 0 <= held_out.share < 1:
        raise ValueError(f"held_out.share must be at least 0 and less than 1, got {held_out.share:g}")
    for name in held_out.sources:
        if name not in sources:
            raise ValueError(f"held_out.sources: {name!r} is no source; [data.sources] has: {', '.join(sources)}")
    if not held_out.levels:
        raise ValueError("held_out.levels must name one level of noise or more, got none")
    for i, level in enumerate(held_out.levels):
        _between(f"held_out.levels.{i}", level, 0, 1)
    if held_out.every and not held_out.share and not held_out.sources:
        raise ValueError("held_out.every needs held_out.share or held_out.sources, got neither")


def check_not_held_out(stage: StageConfig, held_out: HeldOutConfig, where: str) -> None:
    """Whether a stage trains on nothing that is held out.

    Raises:
        ValueError: with `where` (ending with a dot) and the key.
    """
    for name in stage.mix:
        if name in held_out.sources:
            raise ValueError(f"{where}mix.{name}: this source is held out, see held_out.sources")


def check_stage(stage: StageConfig, sources: Mapping[str, SourceConfig], where: str) -> None:
    """Whether the values of a stage make sense, beyond their types.

    Raises:
        ValueError: with `where` (ending with a dot) and the key.
    """
    if not re.fullmatch(r"[\w-]+", stage.name):
        raise ValueError(f"{where}name must be letters, digits, - and _, got {stage.name!r}")
    if stage.steps <= 0 and stage.minutes <= 0:
        raise ValueError(f"{where}steps or {where}minutes must be over 0, got neither")
    for source, share in stage.mix.items():
        if source not in sources:
            known = ", ".join(sources)
            raise ValueError(f"{where}mix.{source} is no source; [data.sources] has: {known}")
        _between(f"{where}mix.{source}", share, 0)
    ends = [[share[i] if isinstance(share, tuple) else share for share in stage.mix.values()] for i in (0, 1)]
    if not all(sum(shares) > 0 for shares in ends):
        raise ValueError(f"{where}mix must have a share over 0 at both ends of the stage, got {stage.mix}")
    _check_optim(stage.optim, where)
    b, c, o = stage.batch, stage.conditions, stage.objective
    for key, number in (("count", b.count), ("size", b.size)):
        _between(f"{where}batch.{key}", number, 1)
    if b.mode == "pack" and b.tokens <= 0:
        raise ValueError(f'{where}batch.tokens must be over 0 with mode = "pack", got {b.tokens}')
    drops = {f"drop_{name}": getattr(c, f"drop_{name}") for name in ("text", "audio", "reference", "history", "pose")}
    for key, value in {**drops, "first_clip": c.first_clip, "prefix": c.prefix}.items():
        _between(f"{where}conditions.{key}", value, 0, 1)
    for i, joint in enumerate(c.joint):
        _between(f"{where}conditions.joint.{i}.probability", joint.probability, 0, 1)
        if len(joint.conditions) < 2:
            raise ValueError(
                f"{where}conditions.joint.{i}.conditions must name two or more conditions, got {joint.conditions}"
            )
    _between(f"{where}conditions.history_noise", c.history_noise, 0)
    for name, value in c.tasks.items():
        _between(f"{where}conditions.tasks.{name}", value, 0)
    for key, value in (("probability", c.anchors.probability), ("single", c.anchors.single)):
        _between(f"{where}conditions.anchors.{key}", value, 0, 1)
    for key, names in (("always", c.anchors.always), ("most", list(c.anchors.most))):
        for name in names:
            if name not in c.anchors.types:
                known = ", ".join(c.anchors.types) or "none"
                raise ValueError(f"{where}conditions.anchors.{key} names {name!r}, which is no type; types: {known}")
    for name, value in {**o.regions, "background": o.background}.items():
        _between(f"{where}objective.{name}", value, 0)
    _between(f"{where}objective.region_share", o.region_share, 0, 1)
    _between(f"{where}objective.gate", o.gate, 0, 1)
    if o.shift <= 0 or o.std <= 0:
        raise ValueError(f"{where}objective.shift and std must be over 0, got {o.shift:g} and {o.std:g}")
    for key in ("weighting_std", "snr_gamma"):
        if getattr(o, key) <= 0:
            raise ValueError(f"{where}objective.{key} must be over 0, got {getattr(o, key):g}")
