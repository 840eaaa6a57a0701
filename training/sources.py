# SPDX-License-Identifier: Apache-2.0
"""The sources of samples that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from talkingdit import families
from talkingdit.data import Source
from training.config import Config
from training.family import train_run
from training.sections import SourceConfig


def open_sources(config: Config) -> dict[str, Source]:
    """Every source of the configuration by its name; every rank must call this.

    Raises:
        UserError, ValueError: a source is not there, or an option is not one of its kind.
    """
    return {name: _open(name, source, config) for name, source in config.data.sources.items()}


def _open(name: str, source: SourceConfig, config: Config) -> Source:
    from talkingdit.data.shards import PrecomputedShards

    where = f"data.sources.{name}"
    for family in map(families.get, families.names()):
        if source.kind in family.sources:
            _known(where, source.options, ())
            return family.train.open_source(source.kind, name, train_run(config))
    if source.path is None:
        raise ValueError(f"{where}.path must be given for kind {source.kind!r}")
    if source.kind == "manifest":
        return _on_the_fly(source.path, source.options, where, name)
    _known(where, source.options, ())
    return PrecomputedShards(source.path, name)


def _on_the_fly(path: Path, options: Mapping[str, Any], where: str, name: str) -> Source:
    """Videos of a manifest, encoded when they are asked for."""
    from dataclasses import fields

    import torch

    from talkingdit.data.cutting import Cutting
    from talkingdit.data.on_the_fly import OnTheFly

    cutting = tuple(field.name for field in fields(Cutting))
    _known(where, options, ("encoders", "device", *cutting))
    if "encoders" not in options:
        raise ValueError(f"{where}.encoders must name the checkpoint folder whose encoders read the manifest")
    folder = Path(options["encoders"])
    clips = families.of_folder(folder).clips
    return OnTheFly(
        path,
        clips.encoders(folder, dtype=torch.float32, device=options.get("device", "cpu")),
        clips.encode_clip,
        Cutting(**{key: value for key, value in options.items() if key in cutting}),
        name,
    )


def _known(where: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in options:
        if key not in known:
            rest = f"; known are kind, path, {', '.join(known)}" if known else "; known are kind and path"
            raise ValueError(f"{where}: unknown key {key!r}{rest}")
