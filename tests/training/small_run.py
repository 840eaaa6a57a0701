# SPDX-License-Identifier: Apache-2.0
"""A run of the drawn world small enough for tests, also for those that kill it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from forked import training

from talkingdit.families.puppet.drawn import DrawnVideos, precompute
from training import parallel
from training.checkpoint_files import CheckpointWriter
from training.config import Config, write_json
from training.family import train_run
from training.loop import Trainer
from training.vae import VaeConfig, make_vae

TINY = {"dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 2, "audio_inject_layers": [0, 1]}


def speech_like(seconds: float, seed: int) -> np.ndarray:
    """Syllables of a buzzing voice with pauses, 16 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(16000 * seconds)) / 16000
    buzz = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 25))
    knots = rng.random(int(seconds * 5) + 2) * (rng.random(int(seconds * 5) + 2) > 0.25)
    return (0.1 * buzz * np.interp(t * 5, np.arange(len(knots)), knots)).astype(np.float32)


def make_world(root: Path) -> Config:
    """Voices, an untrained autoencoder, drawn videos, and the configuration of a run of two stages."""
    rows = []
    for i, split in enumerate(("train", "train", "held_out")):
        soundfile.write(root / f"{i}.flac", speech_like(12, i), 16000)
        rows.append({"path": f"{i}.flac", "speaker": f"s{i}", "split": split})
    (root / "index.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    torch.manual_seed(0)
    make_vae(VaeConfig(base_dim=4, dim_mult=(1, 1, 1))).save_pretrained(root / "vae")
    config = Config()
    config.run.threads, config.run.device = 1, "cpu"
    config.data.voices, config.data.vae, config.data.cache = root, root / "vae", root / "cache"
    config.data.long_videos, config.data.short_videos, config.data.size = 2, 3, 48
    config.model.settings = dict(TINY)
    config.model.clip_latents = 2
    config.batch.count, config.batch.size = 4, 1
    config.optim.warmup_steps, config.optim.name, config.optim.ema = 1, "adamw", 0.9
    # Adam makes whole steps of gradients that are rounding alone; a larger eps keeps these from growing.
    config.optim.lr, config.optim.eps = 1e-3, 1e-5
    config.parallel.precision = "fp32"
    config.checkpoint.every, config.sample.every, config.log.tensorboard = 2, 0, False
    config.stage_tables = [
        {"name": "speak", "steps": 3},
        {"name": "listen", "steps": 3, "train": ["casual_audio_encoder.*", "audio_injector.*"]},
    ]
    precompute(DrawnVideos.of(train_run(config)), config.run.seed)
    return config


def train(config: Config, out: Path, axes: dict[str, int] | None = None) -> list[dict[str, float]]:
    """Run to the end in the processes that call it; the reported numbers of every step, on every rank."""
    config.run.out = out
    for axis, size in (axes or {}).items():
        setattr(config.parallel, axis, size)
    Trainer(config, parallel.start(config.parallel, "cpu")).run()
    return read_log(out)


def read_log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def killed(kill_at: int, *options: str) -> int:
    """`training.train`; SIGKILL cuts the checkpoint of step `kill_at` off."""
    finish = CheckpointWriter.finish

    def die(self: CheckpointWriter, *arguments: Any, **more: Any) -> None:
        if self.final.name.endswith(f"{kill_at:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, *arguments, **more)

    CheckpointWriter.finish = die  # type: ignore[method-assign]
    return training(*options)


def save_config(config: Config, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    config.run.out = out
    write_json(config, out / "configuration.json")
    return out / "configuration.json"
