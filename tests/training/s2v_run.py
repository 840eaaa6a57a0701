# SPDX-License-Identifier: Apache-2.0
"""A tiny Wan-S2V run as a user has it: videos with voices, a metadata.csv, a released folder, a configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clip_files import draw, voice, write_video, write_voice
from official import make_official
from small_run import read_log

from talkingdit.cli.main import main
from training import parallel
from training.config import Config, read_toml, tomllib
from training.loop import Trainer

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
SHAPE: dict[str, Any] = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "text_dim": 32, "audio_dim": 16}
SIZES = {**SHAPE, "audio_inject_layers": [0, 1], "freq_dim": 32}
PIPELINE = {"fps": 16, "motion_frames": 9, "infer_frames": 16, "size_multiple": 16, "steps": 2}


def make_world(root: Path) -> Path:
    """Videos of several sizes, lengths and rates, prepared by the command; returns their folder."""
    make_official(root / "start", **SHAPE, audio_inject_layers=(0, 1), vae_dim=4, settings=PIPELINE)
    videos = ((41, (32, 48), 16), (30, (48, 32), 16), (75, (40, 40), 25), (20, (32, 64), 16))
    rows = ["video,prompt,input_audio"]
    for number, (frames, size, fps) in enumerate(videos):
        sound = voice(frames / fps) if number < 3 else None
        write_video(root / f"{number}.mp4", draw(frames, size), fps, sound)
        rows.append(f'{number}.mp4,"a person, number {number}, talks",{"" if number < 3 else "3.wav"}')
    write_voice(root / "3.wav", 20 / 16)
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    command = ["precompute", "--manifest", str(root / "metadata.csv"), "--checkpoint", str(root / "start")]
    sizes = ["--max-area", "48x48", "--clip-frames", "16", "--min-frames", "8"]
    assert main([*command, "-o", str(root / "data"), *sizes]) == 0
    return root


def write_config(world: Path, name: str, file: Path, stages: int = 0, **changes: dict[str, Any]) -> Path:
    """A file of training/configs made tiny: its first `stages` stages on the data of `world`, two steps each."""
    values = tomllib.loads((CONFIGS / name).read_text())
    values["run"] |= {"out": str(file.parent / "run"), "threads": 1, "device": "cpu", "steps": 4}
    values["model"] |= {"start": str(world / "start"), "settings": SIZES, "clip_latents": 4}
    values["parallel"] = {"precision": "fp32", "activation_checkpointing": "full"}
    values["checkpoint"] = {"every": 2}
    source = next(iter(values["data"]["sources"]))
    values["data"] = {"workers": 0, "sources": {source: {"kind": "precomputed", "path": str(world / "data")}}}
    values["batch"] |= {"count": 2, "tokens": 120, "frames": [4, 2]}
    # Adam makes whole steps of gradients that are rounding alone; a larger eps keeps these from growing.
    values["optim"] |= {"warmup_steps": 1, "lr": 1e-3, "ema": 0.5, "eps": 1e-5}
    values["conditions"]["empty_text"] = str(world / "data" / "empty_text.safetensors")
    values["sample"]["every"] = 0
    values["log"] = {"tensorboard": False}
    if "stages" in values and stages:
        values["stages"] = values["stages"][:stages]
        for stage in values["stages"]:
            stage["steps"] = 2
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_toml(values))
    return file


def _toml(values: dict[str, Any]) -> str:
    lines = []
    for name, table in values.items():
        for one in table if isinstance(table, list) else [table]:
            lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
            lines += [f"{key} = {_value(value)}" for key, value in one.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)


def train(file: Path, axes: dict[str, int] | None = None) -> tuple[list[dict[str, float]], Config]:
    """Train to the end in the processes that call it; the reported numbers and the configuration."""
    config = read_toml(file)
    for axis, size in (axes or {}).items():
        setattr(config.parallel, axis, size)
    Trainer(config, parallel.start(config.parallel, "cpu")).run()
    return read_log(config.run.out), config
