# SPDX-License-Identifier: Apache-2.0
"""The sources of samples that a configuration names."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from talkingdit import families
from talkingdit.data import Source
from talkingdit.data.cutting import Cutting
from talkingdit.data.on_the_fly import OnTheFly
from talkingdit.data.shards import PrecomputedShards
from training.config import Config, SourceConfig
from training.puppets import Puppets, precompute


def open_sources(config: Config) -> dict[str, Source]:
    """Every source of the configuration by its name.

    Puppets are drawn by rank 0 if nobody has done so before; every rank must call this.

    Raises:
        UserError, ValueError: a source is not there, or an option is not one of its kind.
    """
    return {name: _open(name, source, config) for name, source in config.data.sources.items()}


def _open(name: str, source: SourceConfig, config: Config) -> Source:
    where = f"data.sources.{name}"
    if source.kind == "puppets":
        _known(where, source.options, ())
        if dist.get_rank() == 0:
            precompute(config.data, config.run.seed)
        dist.barrier()
        return Puppets(config.data.cache, config.model.clip_latents, config.model.audio_context, name)
    if source.path is None:
        raise ValueError(f"{where}.path must be given for kind {source.kind!r}")
    if source.kind in ("shards", "precomputed"):
        _known(where, source.options, ())
        return PrecomputedShards(source.path, name)
    cutting = tuple(field.name for field in fields(Cutting))
    _known(where, source.options, ("encoders", "device", *cutting))
    if "encoders" not in source.options:
        raise ValueError(f"{where}.encoders must name the checkpoint folder whose encoders read the manifest")
    device = source.options.get("device", "cpu")
    folder = Path(source.options["encoders"])
    clips = families.of_folder(folder).clips
    return OnTheFly(
        source.path,
        clips.encoders(folder, dtype=torch.float32, device=device),
        clips.encode_clip,
        Cutting(**{key: value for key, value in source.options.items() if key in cutting}),
        name,
    )


def _known(where: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in options:
        if key not in known:
            rest = f"; known are kind, path, {', '.join(known)}" if known else "; known are kind and path"
            raise ValueError(f"{where}: unknown key {key!r}{rest}")
