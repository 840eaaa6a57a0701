# SPDX-License-Identifier: Apache-2.0
"""The programs of examples/ do what they say, on small data."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from clip_files import draw, voice, write_video

from talkingdit.checkpoints.lora import Loras
from talkingdit.media.files import read_video
from talkingdit.models import load

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
sys.path.append(str(EXAMPLES.parent / "tests" / "training"))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    words = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
    assert words is not None
    assert f"\n    python examples/{name}.py" in words
    assert f'example("{name}")' in Path(__file__).read_text(), "no test runs it"


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_block_of_ops_equals_plain_pytorch(dtype: str, most: float) -> None:
    assert example("attention_with_ops").main(["--dtype", dtype]) < most


def test_a_second_of_voice_becomes_a_video(tmp_path: Path) -> None:
    example("generate_video").main(["--seconds", "1", "--output", str(tmp_path / "out.mp4")])
    assert read_video(tmp_path / "out.mp4")[0].shape == (16, 96, 96, 3)


def test_a_pipeline_streams_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = example("pipeline").main(["--steps", "1", "--output", str(tmp_path / "out.mp4")])
    assert out.interrupted
    assert read_video(tmp_path / "out.mp4")[0].shape == (32, 96, 96, 3)
    assert "step 0 at 1000" in capsys.readouterr().out


def test_the_notebook_runs_from_its_first_cell_to_its_last() -> None:
    """Its code cells in order, as a kernel would: no Jupyter is needed for that."""
    notebook = json.loads((EXAMPLES / "talking.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), "keep outputs out of it"
    names: dict[str, Any] = {}
    for cell in code:
        exec("".join(cell["source"]), names)
    assert names["out"].frames.shape == (16, 96, 96, 3)
    assert read_video(names["video"])[0].shape == (16, 384, 384, 3)
    assert names["blocks"] == [4] * 4  # as they are decoded


def test_kernels_go_into_a_model_and_out_again(capsys: pytest.CaptureFixture[str]) -> None:
    difference, restored = example("accelerate_diffusers").main([])
    assert 0 < difference < 1e-5
    assert restored
    assert "replaced: 2 x block" in capsys.readouterr().out


@pytest.mark.slow
def test_adapters_come_from_a_folder_of_videos(tmp_path: Path) -> None:
    from official import make_official
    from s2v_run import PIPELINE, SHAPE, write_config

    (tmp_path / "videos").mkdir()
    for number in range(2):
        write_video(tmp_path / "videos" / f"{number}.mp4", draw(41), 16, voice(41 / 16))
    (tmp_path / "videos" / "0.txt").write_text("a man talks\n")
    start = make_official(tmp_path / "start", **SHAPE, audio_inject_layers=(0, 1), vae_dim=4, settings=PIPELINE)
    config = write_config(tmp_path, "wan_s2v_lora.toml", tmp_path / "tiny.toml", lora={"rank": 2, "alpha": 2})
    command = [str(tmp_path / "videos"), "--checkpoint", str(start), "--out", str(tmp_path / "out")]
    command += ["--config", str(config), "--steps", "2", "--clip-frames", "16", "--max-area", "48x48"]
    adapter = example("finetune_lora").main([*command, "--", "--checkpoint.every", "2"])
    model = load(start)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loras = Loras(model)
    loras.load(adapter)
    loras.merge()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed
    assert all(name.endswith(".weight") for name in changed)


@pytest.mark.slow
def test_two_processes_train(tmp_path: Path) -> None:
    losses = example("train_two_processes").main(["--out", str(tmp_path), "--steps", "1"])
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
