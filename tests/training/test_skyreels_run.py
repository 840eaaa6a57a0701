# SPDX-License-Identifier: Apache-2.0
"""SkyReels-Audio trains through both stages, animation and then both tasks, on two processes as on one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_files import draw, voice, write_video
from s2v_run import CONFIGS, _toml, train
from tiny_i2v import WIDTHS
from tiny_skyreels import AUDIO_DIM, make_skyreels

from talkingdit.cli.main import main
from talkingdit.families.skyreels_audio.checkpoint import SkyReelsAudioSettings
from talkingdit.models import load
from training.config import tomllib

pytestmark = pytest.mark.slow
HEARS = {"audio_dim": AUDIO_DIM, "audio_inject_layers": [0, 1]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos with voices and boxes of lower faces, prepared by the command."""
    root = tmp_path_factory.mktemp("skyreels")
    make_skyreels(root / "start", fps=16, chunk_latents=5)
    rows = []
    for number in range(2):
        write_video(root / f"{number}.mp4", draw(36 + 8 * number, (32, 48)), 16, voice(36 / 16))
        regions = {"lower_face": [0.2, 0.5, 0.7, 0.9], "lips": [0.3, 0.6, 0.6, 0.8]}
        rows.append({"video": f"{number}.mp4", "caption": f"person {number}", "regions": regions})
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["precompute", "--manifest", str(root / "m.jsonl"), "--checkpoint", str(root / "start")]
    sizes = ["--max-area", "48x32", "--clip-frames", "16", "--min-frames", "8"]
    assert main([*command, "-o", str(root / "data"), *sizes]) == 0
    return root


def write_config(world: Path, file: Path) -> Path:
    """training/configs/skyreels_audio.toml, its stages one step each, on the data of `world`."""
    values = tomllib.loads((CONFIGS / "skyreels_audio.toml").read_text())
    sources = {name: {"kind": "precomputed", "path": str(world / "data")} for name in values["data"]["sources"]}
    values["run"] |= {"out": str(file.parent / "run"), "threads": 1, "device": "cpu", "steps": 2}
    model = {"preset": "skyreels_audio_tiny", "start": str(world / "start"), "clip_latents": 4}
    values["model"] |= model | {"settings": WIDTHS | HEARS}
    values["parallel"] = {"precision": "fp32", "activation_checkpointing": "full"}
    values["checkpoint"] = {"every": 2}
    values["data"] = {"workers": 0, "sources": sources}
    values["batch"] |= {"count": 2, "tokens": 160}
    values["optim"] |= {"warmup_steps": 1, "lr": 1e-3, "ema": 0.5, "eps": 1e-5}
    values["conditions"]["empty_text"] = str(world / "data" / "empty_text.safetensors")
    values["sample"] = {"every": 0}
    values["log"] = {"tensorboard": False}
    for stage in values["stages"]:
        stage["steps"] = 1
    values["stages"][1]["conditions"]["tasks"] = {"edit": 1}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_toml(values))
    return file


def losses(log: list[dict[str, float]]) -> list[float]:
    assert all(math.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in log)
    return [line[name] for line in log for name in ("loss", "gradient_norm")]


def test_two_processes_train_as_one_and_what_they_made_is_loaded(world: Path, tmp_path: Path, processes: Any) -> None:
    file = write_config(world, tmp_path / "one" / "tiny.toml")
    [(alone, _)] = processes(1, train, file, timeout=300)
    assert [line["step"] for line in alone] == [1, 2]
    other = write_config(world, tmp_path / "two" / "tiny.toml")
    (both, _), _ = processes(2, train, other, {"ulysses": 2}, timeout=300)
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)

    made = tmp_path / "one" / "run" / "model"
    model, start = load(made), load(world / "start")
    for name in ("blocks.0.audio_attn.v.weight", "audio_proj.1.weight", "blocks.1.self_attn.q.weight"):
        assert not torch.equal(model.state_dict()[name].float(), start.state_dict()[name].float()), name
    settings = SkyReelsAudioSettings.load(made / "pipeline.json")
    assert (settings.unknown, settings.held, settings.chunk_latents, settings.overlap) == ("zeros", True, 5, 4)
