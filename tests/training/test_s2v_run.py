# SPDX-License-Identifier: Apache-2.0
"""Wan-S2V from a user's videos to a video of the trained model, through the commands that a user types."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clip_files import write_voice
from forked import Ranks, training
from s2v_run import make_world, train, write_config
from safetensors.torch import load_file, save_file
from small_run import read_log

from talkingdit.checkpoints.lora import Loras
from talkingdit.checkpoints.weights import open_weights
from talkingdit.cli.main import main
from talkingdit.media.files import read_video
from talkingdit.models import WanInputs, load
from training import parallel
from training.build import sharded_networks
from training.config import read_toml
from training.model_state import gather_state

pytestmark = pytest.mark.slow
AUDIO = ("casual_audio_encoder.", "audio_injector.")
HEARD = ("loss", "gradient_norm", "loss/with_audio")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("s2v"))


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory, processes: Any) -> Path:
    """The configuration of a finished run of one process; the run is beside it."""
    file = write_config(world, "wan_s2v.toml", tmp_path_factory.mktemp("alone") / "tiny.toml", stages=2)
    processes(1, train, file, timeout=120)
    return file


def same_curve(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 4]
    for mine, other in zip(ours, theirs, strict=True):
        for name in HEARD:
            assert math.isfinite(mine[name])
            assert mine[name] == pytest.approx(other[name], rel=1e-5), (mine["step"], name)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_weights(folder).stream())


def test_from_videos_over_two_processes_to_a_video(world: Path, alone: Path, tmp_path: Path) -> None:
    file = write_config(world, "wan_s2v.toml", tmp_path / "tiny.toml", stages=2)
    options = ["--config", str(file), "--parallel.ulysses", "2"]
    statuses, said = Ranks(2, training, *options, said=tmp_path / "said").wait(240)
    assert statuses == [0, 0], said
    assert "stage audio_encoder: trains" in said
    same_curve(read_log(tmp_path / "run"), read_log(alone.parent / "run"))

    model = load(tmp_path / "run" / "model")  # raises for a weight too few or too many
    start, trained = weights_of(world / "start"), model.state_dict()
    assert trained.keys() == start.keys()
    for part in ("patch_embedding", "blocks.1.self_attn.q", "audio_injector.injector.0.o", "frame_packer.proj"):
        assert not torch.equal(trained[f"{part}.weight"].float(), start[f"{part}.weight"].float())

    folder = Path(shutil.copytree(world / "start", tmp_path / "whole"))
    for old in folder.glob("diffusion_pytorch_model*"):
        old.unlink()
    for new in (tmp_path / "run" / "model").iterdir():
        shutil.copy(new, folder)
    cv2.imwrite(str(tmp_path / "face.png"), np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))
    write_voice(tmp_path / "voice.wav", 1.2)
    files = ["--image", str(tmp_path / "face.png"), "--audio", str(tmp_path / "voice.wav"), "-o"]
    more = ["--checkpoint", str(folder), "--prompt", "a person talks", "--max-area", "48x48"]
    videos = []
    for checkpoint in (folder, world / "start"):
        more[1] = str(checkpoint)
        assert main(["generate", *files, str(tmp_path / "out.mp4"), *more]) == 0
        videos.append(read_video(tmp_path / "out.mp4")[0])
    assert videos[0].shape == (20, 48, 48, 3)
    assert not np.array_equal(*videos)  # the folder's new weights are those that are used


def test_a_run_goes_on_on_two_processes_as_if_nothing_had_been(
    world: Path, alone: Path, tmp_path: Path, processes: Any
) -> None:
    shutil.copytree(alone.parent / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    file = write_config(world, "wan_s2v.toml", tmp_path / "tiny.toml", stages=2)
    (log, _), _ = processes(2, train, file, {"ulysses": 2}, timeout=120)
    same_curve(log, read_log(alone.parent / "run"))
    ours, theirs = (weights_of(path / "run" / "model") for path in (tmp_path, alone.parent))
    for name, weight in ours.items():  # exported in bfloat16: a last bit may fall the other way
        torch.testing.assert_close(weight, theirs[name], rtol=1e-2, atol=1e-4)


def test_of_the_audio_modules_alone_all_else_stays_to_the_bit(world: Path, tmp_path: Path, processes: Any) -> None:
    file = write_config(world, "wan_s2v_audio_only.toml", tmp_path / "tiny.toml", stages=1)
    processes(1, train, file, timeout=120)
    start, trained = weights_of(world / "start"), weights_of(tmp_path / "run" / "model")
    changed = {name for name, value in start.items() if not torch.equal(trained[name].bfloat16(), value)}
    assert changed
    assert all(name.startswith(AUDIO) for name in changed)
    assert {name for name in start if name.startswith(AUDIO) and start[name].dim() > 1} <= changed


def lora_velocities(file: Path, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[str], dict[str, Any]]:
    """Velocity of the run's newest weights, names in its checkpoint, and its weights."""
    from torch.distributed.checkpoint import FileSystemReader

    config = read_toml(file)
    mesh = parallel.start(config.parallel, "cpu")
    from training.loop import Trainer

    trainer = Trainer(config, mesh)
    newest = sorted((config.run.out / "checkpoints").iterdir())[-1]
    names = list(FileSystemReader(newest).read_metadata().state_dict_metadata)
    with torch.no_grad(), trainer.ema.swapped():
        velocity = trainer.networks.transformer(**inputs)
        state = gather_state(trainer.networks)
    return velocity, names, state


def test_adapters_are_all_that_a_lora_run_keeps_and_do_elsewhere_what_they_did_here(
    world: Path, tmp_path: Path, processes: Any
) -> None:
    lora = {"rank": 4, "alpha": 8}
    file = write_config(world, "wan_s2v_lora.toml", tmp_path / "tiny.toml", lora=lora)
    processes(1, train, file, timeout=120)
    straight = read_log(tmp_path / "run")
    torch.manual_seed(0)
    inputs = {
        "latents": torch.randn(1, 16, 2, 4, 4),
        "timestep": torch.tensor([300.0]),
        "conditions": WanInputs(torch.randn(1, 5, 32), audio=torch.randn(1, 25, 16, 8)),
    }
    [(velocity, names, _)] = processes(1, lora_velocities, file, inputs, timeout=120)
    kept = [name for name in names if name.startswith(("networks/", "averages/"))]
    assert kept
    assert all(".lora_" in name for name in kept)

    model = load(world / "start", dtype=torch.float32)
    with torch.no_grad():
        before = model(**inputs)
        Loras(model).load(tmp_path / "run" / "model" / "adapter.safetensors")
        after = model(**inputs)
    # The file is in bfloat16, what trained is not.
    assert (after - velocity).abs().max() < 1e-2 * (before - velocity).abs().max()

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    (log, _), _ = processes(2, train, file, {"ring": 2}, timeout=120)
    same_curve(log, straight)


def test_adapters_on_one_card_learn_go_on_and_are_exported(world: Path, tmp_path: Path, processes: Any) -> None:
    """The configuration for 24 GB, with eight-bit weights of which some wait on the host."""
    more: dict[str, Any] = {"lora": {"rank": 4}, "held_out": {"every": 2, "share": 0.3, "clips": 2}}
    file = write_config(world, "wan_s2v_lora_24gb.toml", tmp_path / "tiny.toml", **more, model={"swap": 2})
    text = file.read_text()
    assert 'frozen = "int8"' in text
    file.write_text(text.replace('name = "adamw8bit"', 'name = "adamw"').replace(
        'activation_checkpointing = "full"', 'activation_checkpointing = "full"\ninputs = "host_bf16"'))  # fmt: skip
    processes(1, train, file, timeout=200)
    straight = read_log(tmp_path / "run")
    losses = [line for line in straight if "loss" in line]
    held = [line["held_out/loss"] for line in straight if "held_out/loss" in line]
    assert len(held) == 3
    assert len(set(held)) == 3
    plain = write_config(world, "wan_s2v_lora.toml", tmp_path / "plain" / "tiny.toml", **more)
    processes(1, train, plain, timeout=200)
    others = [line["held_out/loss"] for line in read_log(tmp_path / "plain" / "run") if "held_out/loss" in line]
    assert held[0] != others[0]
    assert held == pytest.approx(others, rel=0.02)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    (log, _), _ = processes(2, train, file, {"ulysses": 2}, timeout=200)
    same_curve([line for line in log if "loss" in line], losses)
    adapter = load_file(tmp_path / "run" / "model" / "adapter.safetensors")
    assert all(value.isfinite().all() for value in adapter.values())
    assert len([name for name in adapter if ".lora_A." in name]) == 2 * (8 + 2) + 2 * 4


def video_folder(world: Path, folder: Path) -> Path:
    """A Wan text-to-video model in the official layout: the weights that it has in common with Wan-S2V."""
    new = (*AUDIO, "cond_encoder.", "trainable_cond_mask.", "frame_packer.")
    state = {name: value for name, value in weights_of(world / "start").items() if not name.startswith(new)}
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"_class_name": "WanModel", "model_type": "t2v"}')
    return folder


def first_networks(file: Path) -> dict[str, torch.Tensor]:
    config = read_toml(file)
    return gather_state(sharded_networks(config, parallel.start(config.parallel, "cpu"), resumes=False))


def test_a_run_begins_from_a_text_to_video_model_and_goes_on(world: Path, tmp_path: Path, processes: Any) -> None:
    model = {"start": str(video_folder(world, tmp_path / "t2v"))}
    file = write_config(world, "wan_s2v.toml", tmp_path / "tiny.toml", stages=2, model=model)
    [first] = processes(1, first_networks, file, timeout=120)
    taken = load_file(tmp_path / "t2v" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(first[f"transformer.{name}"].bfloat16(), value) for name, value in taken.items())
    (log, _), _ = processes(2, train, file, timeout=120)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "t2v")  # a run that goes on needs it no more
    [(again, _)] = processes(1, train, file, timeout=120)
    same_curve(again, log)
    assert set(weights_of(tmp_path / "run" / "model")) == set(weights_of(world / "start"))
