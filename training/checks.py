# SPDX-License-Identifier: Apache-2.0
"""Whether the values of a configuration make sense, beyond their types."""

from __future__ import annotations

import re
from collections.abc import Mapping

from talkingdit import families
from training.sections import Ramp, SampleConfig, SourceConfig, StageConfig

KINDS = ("manifest", "shards", "precomputed")  # of sources that every family may train on


def _between(where: str, value: Ramp, low: float, high: float = float("inf")) -> None:
    for end in value if isinstance(value, tuple) else (value,):
        if not low <= end <= high:
            bounds = f"at least {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
            raise ValueError(f"{where} must be {bounds}, got {end:g}")


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
    if o.shift <= 0 or o.std <= 0:
        raise ValueError(f"{where}objective.shift and std must be over 0, got {o.shift:g} and {o.std:g}")
