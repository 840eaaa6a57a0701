# SPDX-License-Identifier: Apache-2.0
"""One configuration for a run: dataclasses, read from a TOML file, overridden by options like `--optim.lr 1e-3`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass
class RunConfig:
    out: Path = Path("runs/puppets")  # checkpoints, logs and the exported model go here
    seed: int = 0
    threads: int = 2
    minutes: float = 0.0  # wall-clock budget that the schedules follow; 0: they follow `steps`
    steps: int = 6000
    save_every: int = 500
    validate_every: int = 1000


@dataclass
class DataConfig:
    voices: Path = Path("data/voices")  # made by `python -m training.voices`
    vae: Path = Path("runs/vae/vae")  # made by `python -m training.vae`
    shipped_vae: Path | None = (
        None  # exported in its place: the same encoder, a decoder that `training.vae_stream` made
    )
    cache: Path = Path("data/puppets")  # latents and features of the drawn videos, made on first use
    long_videos: int = 240  # 169 frames each: clips deep inside a long video, with a full history
    short_videos: int = 480  # 49 frames each: more characters
    size: int = 96
    fps: int = 16


@dataclass
class ModelConfig:
    preset: str = "puppet_tiny"
    clip_latents: int = 8
    audio_context: int = 8  # feature frames before the clip that the audio encoder sees


@dataclass
class OptimConfig:
    batch: int = 12
    lr: float = 2e-3  # of AdamW: embeddings, norms, biases, convolutions
    muon_lr: float = 2e-3  # of Muon: matrices of the blocks; 0 trains them with AdamW too
    weight_decay: float = 0.01
    warmup_steps: int = 100
    clip_norm: float = 1.0
    ema: float = 0.998
    precision: Literal["bf16", "fp32"] = "bf16"


@dataclass
class ObjectiveConfig:
    shift: float = 2.0  # moves timesteps towards noise: sigma' = shift sigma / (1 + (shift - 1) sigma)
    mouth_weight: float = 8.0  # weight of latent cells that a mouth touches; the mean weight is kept at one
    drop_text: float = 0.1
    drop_audio: float = 0.12
    drop_reference: float = 0.05
    drop_history: float = 0.1
    first_clip: float = 0.3  # share of batches that start a video, and so have no history
    history_noise: float = 0.15  # largest standard deviation of noise added to the history, against drift


@dataclass
class SampleConfig:
    steps: int = 8
    text_guidance: float = 1.0
    audio_guidance: float = 2.0
    clips: int = 3  # held-out voices generated at each validation
    seconds: float = 6.0


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


_PATHS = ("shipped_vae",)  # paths whose default is None


def _fill(target: Any, values: dict[str, Any], where: str, file: Path) -> None:
    known = {f.name for f in fields(target)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{file}: unknown key {where}{key}; known here: {', '.join(sorted(known))}")
        current = getattr(target, key)
        if is_dataclass(current):
            _fill(current, value, f"{where}{key}.", file)
        else:
            setattr(target, key, Path(value) if isinstance(current, Path) or key in _PATHS else value)


def read_toml(file: Path) -> Config:
    """Read a configuration; keys left out keep their defaults.

    Raises:
        ValueError: the file cannot be read or has a key that no dataclass has.
    """
    config = Config()
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"configuration {file} cannot be read: {error}") from error
    _fill(config, values, "", file)
    return config


def parse(arguments: list[str] | None = None) -> Config:
    """`--config file.toml` first, then dotted overrides."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    base = Config()
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 >= len(arguments):
            raise ValueError("--config needs a file name")
        base = read_toml(Path(arguments[at + 1]))
        del arguments[at : at + 2]
    return tyro.cli(Config, args=arguments, default=base)


def write_json(config: Config, file: Path) -> None:
    """The configuration as it ran, beside every checkpoint."""
    file.write_text(json.dumps(asdict(config), indent=1, default=str))
