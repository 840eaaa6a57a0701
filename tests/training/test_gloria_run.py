# SPDX-License-Identifier: Apache-2.0
"""Gloria trains through all of its stages on anchors from all over a video, on two processes as on one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clip_files import draw, voice, write_video
from s2v_run import CONFIGS, _toml, train
from small_run import read_log
from tiny_i2v import WIDTHS, make_i2v

from talkingdit.cli.main import main
from talkingdit.families.gloria.anchors import KINDS
from talkingdit.families.gloria.checkpoint import GloriaSettings
from talkingdit.models import load
from training.config import tomllib

pytestmark = pytest.mark.slow
HEARS = {"audio_dim": 16, "audio_layers": 25, "audio_width": 12, "audio_inject_layers": [0]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos with voices and named frames, prepared by the command; with anchors in sizes of their own."""
    root = tmp_path_factory.mktemp("gloria")
    settings = {"size_multiple": 16, "anchor_area": 32 * 32, "prefix_latents": 1, "chunk_latents": 5}
    make_i2v(root / "start", "gloria_tiny", settings, **HEARS)
    cv2.imwrite(str(root / "smile.png"), np.full((20, 20, 3), 90, np.uint8))
    rows = []
    for number in range(3):
        write_video(root / f"{number}.mp4", draw(36 + 8 * number, (32, 48)), 16, voice(36 / 16))
        named: dict[str, Any] = {"back": [0.5, 1.9], "left": [1.0]} if number != 1 else {}
        named |= {"happy": "smile.png", "sad": 1.2} if number else {}
        rows.append({"video": f"{number}.mp4", "caption": f"person {number}", "outside": named})
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["precompute", "--manifest", str(root / "m.jsonl"), "--checkpoint", str(root / "start")]
    sizes = ["--max-area", "48x32", "--clip-frames", "16", "--min-frames", "8"]
    assert main([*command, "-o", str(root / "data"), *sizes]) == 0
    return root


def write_config(world: Path, file: Path, **changes: Any) -> Path:
    """training/configs/gloria.toml, its four stages one step each, on the data of `world`."""
    values = tomllib.loads((CONFIGS / "gloria.toml").read_text())
    sources = {name: {"kind": "precomputed", "path": str(world / "data")} for name in values["data"]["sources"]}
    values["run"] |= {"out": str(file.parent / "run"), "threads": 1, "device": "cpu", "steps": 4}
    model = {"preset": "gloria_tiny", "start": str(world / "start"), "clip_latents": 4}
    values["model"] |= model | {"settings": WIDTHS | HEARS}
    values["parallel"] = {"precision": "fp32", "activation_checkpointing": "full"}
    values["checkpoint"] = {"every": 2}
    values["data"] = {"workers": 0, "sources": sources}
    values["batch"] |= {"count": 2, "tokens": 160} | changes
    values["optim"] |= {"warmup_steps": 1, "lr": 1e-3, "ema": 0.5, "eps": 1e-5}
    values["conditions"]["empty_text"] = str(world / "data" / "empty_text.safetensors")
    values["sample"] = {"every": 0}
    values["log"] = {"tensorboard": False}
    for stage in values["stages"]:
        stage["steps"] = 1
        if "prefix_latents" in stage.get("conditions", {}):
            stage["conditions"]["prefix_latents"] = 1
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_toml(values))
    return file


def losses(log: list[dict[str, float]]) -> list[float]:
    assert all(math.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in log)
    return [line[name] for line in log for name in ("loss", "gradient_norm")]


def test_two_processes_train_as_one_and_what_they_made_generates(world: Path, tmp_path: Path, processes: Any) -> None:
    file = write_config(world, tmp_path / "one" / "tiny.toml")
    [(alone, _)] = processes(1, train, file, timeout=200)
    assert [line["step"] for line in alone] == [1, 2, 3, 4]
    other = write_config(world, tmp_path / "two" / "tiny.toml")
    (both, _), _ = processes(2, train, other, {"ulysses": 2}, timeout=200)
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(read_log(tmp_path / "one" / "run")) == losses(alone)

    made = tmp_path / "one" / "run" / "model"
    model, start = load(made), load(world / "start")
    for name in ("blocks.0.audio_attn.v.weight", "audio_proj.layers", "blocks.1.self_attn.q.weight"):
        assert not torch.equal(model.state_dict()[name].float(), start.state_dict()[name].float()), name
    settings = GloriaSettings.load(made / "pipeline.json")
    assert (settings.unknown, settings.held, settings.chunk_latents) == ("zeros", True, 5)


def test_the_kinds_of_the_configuration_are_those_of_the_model() -> None:
    for stage in tomllib.loads((CONFIGS / "gloria.toml").read_text())["stages"]:
        types = stage.get("conditions", {}).get("anchors", {}).get("types", {})
        for name, kinds in types.items():
            assert tuple(kinds) == KINDS[{"viewpoint": "view"}.get(name, name)]
