# SPDX-License-Identifier: Apache-2.0
"""What a run of adapters loses by every switch that saves memory, on the drawn world and the model that ships.

    python -m bench.adapters [--steps N] [--quick] [--out bench/results]

The same run (seed, data, order, noise) with weights in float32 and with each switch. Told is how far the adapters are
from those of the plain run when it ends, beside how far they have come, and the loss on held-out clips with fixed
noise before and after. Weights come in bfloat16, as those of released models do.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from bench import record
from talkingdit.families.puppet.drawn import DrawnVideos, precompute
from talkingdit.models import load_checkpoint
from training import parallel
from training.config import Config
from training.family import train_run
from training.loop import Trainer
from training.model_state import gather_state

_RESULTS = Path(__file__).resolve().parent / "results"
SECONDS = 12  # of a voice: a long drawn video with room to choose from
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen int8": {"frozen": "int8"},
    "another seed": {"seed": 1},
    "inputs bf16": {"inputs": "bf16"},
    "frozen bf16": {"frozen": "bf16"},
    "frozen fp8": {"frozen": "fp8"},
    "inputs host": {"inputs": "host"},
    "8-bit moments": {"optimizer": "adamw8bit"},
    "one card": {"frozen": "int8", "swap": 2, "inputs": "host_bf16", "optimizer": "adamw8bit"},
}


def make_world(folder: Path, quick: bool) -> Config:
    """The shipped model in bfloat16, drawn videos that speak with the shipped voice and its reverse, and a run."""
    with as_file(files("talkingdit.puppets") / "assets") as assets:
        checkpoint = load_checkpoint(assets / "model", torch.bfloat16, "cpu")
        checkpoint.transformer.save_pretrained(folder / "start" / "transformer")
        checkpoint.text_encoder.save_pretrained(folder / "start" / "text_encoder")
        checkpoint.vae.float().save_pretrained(folder / "vae")
        settings = dict(checkpoint.transformer.config)
        voice, rate = soundfile.read(assets / "voice.flac", dtype="float32")
    voice = np.resize(voice, SECONDS * rate)
    rows = []
    for name, split, sound in (("0", "train", voice), ("1", "train", voice[::-1]), ("2", "held_out", voice)):
        soundfile.write(folder / f"{name}.flac", sound, rate)
        rows.append(json.dumps({"path": f"{name}.flac", "speaker": name, "split": split}))
    (folder / "index.jsonl").write_text("\n".join(rows))
    config = Config()
    config.run.device, config.run.threads = "cpu", torch.get_num_threads()
    config.model.settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    config.model.start = folder / "start"
    config.data.voices, config.data.vae, config.data.cache = folder, folder / "vae", folder / "cache"
    config.data.long_videos, config.data.short_videos = (1, 3) if quick else (6, 12)
    config.lora.rank = 8
    config.batch.count, config.batch.size = 1, 2 if quick else 4
    config.optim.name, config.optim.lr, config.optim.warmup_steps, config.optim.ema = "adamw", 1e-3, 5, 0.0
    config.parallel.activation_checkpointing = "full"
    config.checkpoint.every, config.checkpoint.asynchronous, config.sample.every = 10**6, False, 0
    config.log.tensorboard = False
    config.held_out.share, config.held_out.clips = 0.15, 2 if quick else 6
    precompute(DrawnVideos.of(train_run(config)), config.run.seed)
    return config


def adapters_of(trainer: Trainer) -> Tensor:
    """Every adapter as it acts, B A of each layer, flat in float64."""
    state = {name: value.double() for name, value in gather_state(trainer.networks).items() if ".lora_" in name}
    names = [name for name in state if ".lora_A." in name]
    return torch.cat([(state[name.replace(".lora_A.", ".lora_B.")] @ state[name]).flatten() for name in names])


def run(config: Config, out: Path, steps: int, changes: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """One run: what was measured, and its adapters."""
    config.run.out, config.run.steps, config.held_out.every = out, steps, steps
    config.model.frozen = changes.get("frozen", "float32")
    config.model.swap = changes.get("swap", 0)
    config.parallel.inputs = changes.get("inputs", "float32")
    config.optim.name = changes.get("optimizer", "adamw")
    config.run.seed = changes.get("seed", 0)
    trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
    trainer.run()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    held = [line["held_out/loss"] for line in log if "held_out/loss" in line]
    losses = [line["loss"] for line in log if "loss" in line]
    found = {"held_out_before": held[0], "held_out_after": held[-1], "loss_last": float(np.mean(losses[-10:]))}
    adapters = adapters_of(trainer)
    parallel.stop()
    return found, adapters


def compare(folder: Path, steps: int, quick: bool, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for every switch."""
    config = make_world(folder, quick)
    plain: Tensor | None = None
    for name, changes in CHANGES.items():
        if only and name not in only and name != "plain":
            continue
        found, adapters = run(config, folder / name.replace(" ", "-"), steps, changes)
        plain = adapters if plain is None else plain
        apart = float((adapters - plain).norm() / plain.norm())
        yield {"run": name, **changes, "steps": steps, **found, "adapters_apart": apart}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.adapters", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="few videos, small batches")
    parser.add_argument("--only", action="append", default=[], metavar="RUN", help="beside the plain one")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="DIR", help="(default: bench/results)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = {**record.header("adapters", torch.device("cpu"), options.quick), "rows": []}
        for row in compare(Path(folder), options.steps, options.quick, options.only):
            print(json.dumps(row), file=sys.stderr, flush=True)
            result["rows"].append(row)
            path = record.save(result, options.out, "cpu")  # after every row: an interruption keeps what there is
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
