# SPDX-License-Identifier: Apache-2.0
"""A family in one file of the tests, registered by name, goes all the way without an edit elsewhere."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile
import torch
import toy_train
from forked import Ranks
from tiny_checkpoint import make_vae

from talkingdit import families
from talkingdit.cli.main import main
from talkingdit.data.sample import ClipRequest, Sample
from talkingdit.data.shards import PrecomputedShards, ShardWriter
from talkingdit.media.files import VideoWriter, read_video
from talkingdit.models import load_checkpoint
from training import export

SETTINGS = """
[run]
device = "cpu"
threads = 1
steps = 4
[model]
preset = "toy_tiny"
text_encoder = "none"
clip_latents = 2
[parallel]
precision = "fp32"
[checkpoint]
every = 2
[batch]
count = 2
size = 2
[optim]
warmup_steps = 1
eps = 1e-5
ema = 0.5
[conditions]
drop_history = 0.0
[sample]
every = 0
[log]
tensorboard = false
"""


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "_MODULES", dict(families._MODULES))
        families.register("toy", "toy_family")
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips in a shard, an autoencoder and a configuration."""
    root = tmp_path_factory.mktemp("toy")
    (root / "data").mkdir()
    writer = ShardWriter(root / "data", 0, 10**8)
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        shapes = {"latents": (16, 2, 4, 6), "audio": (3, 6, 8), "text": (4, 8)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        if number == 0:
            del tensors["audio"]
        writer.add(Sample(f"clip{number}", "toy", caption="a toy", **tensors), {"fps": 16}, torch.float32)
    writer.finish()
    make_vae().save_pretrained(root / "vae")
    paths = f'[data]\nvae = "{root}/vae"\nsources = {{ toys = {{ kind = "precomputed", path = "{root}/data" }} }}\n'
    (root / "toy.toml").write_text(SETTINGS + paths)
    return root


def run(world: Path, out: Path, processes: int, kill: str = "") -> list[int]:
    """Trains in so many processes; their exit statuses."""
    options = ["--config", str(world / "toy.toml"), "--run.out", str(out)]
    return Ranks(processes, toy_train.train, kill, *options, said=world / "said").wait(300)[0]


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_it_trains_on_two_processes_and_goes_on_after_a_kill(world: Path, tmp_path: Path) -> None:
    assert run(world, tmp_path / "straight", 2) == [0, 0]
    assert -signal.SIGKILL in run(world, tmp_path / "killed", 2, kill="4")
    names = [path.name for path in sorted((tmp_path / "killed" / "checkpoints").iterdir())]
    assert names == ["step-00000002", "step-00000004.tmp"]
    assert run(world, tmp_path / "killed", 1) == [0]
    straight, killed = (log_of(tmp_path / name) for name in ("straight", "killed"))
    assert [line["step"] for line in straight] == [line["step"] for line in killed] == [1, 2, 3, 4]
    for one, other in zip(straight, killed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)

    export.main(export.ExportFlags(tmp_path / "straight", tmp_path / "exported"))
    shutil.rmtree(tmp_path / "straight" / "checkpoints")
    for folder in (tmp_path / "exported", tmp_path / "straight" / "model", tmp_path / "killed" / "model"):
        assert families.of_folder(folder).name == "toy"
    first, second = (
        load_checkpoint(tmp_path / name, torch.float32, "cpu").transformer.state_dict()
        for name in ("exported", "killed/model")
    )
    for name, weight in first.items():  # exported in bfloat16: a last bit may fall the other way
        torch.testing.assert_close(weight, second[name], rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    families.get("toy").load.load("toy_tiny").save_pretrained(folder / "transformer")
    make_vae().save_pretrained(folder / "vae")
    return folder


def test_it_generates(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cv2.imwrite(str(tmp_path / "face.png"), np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    soundfile.write(tmp_path / "voice.wav", 0.1 * np.random.default_rng(1).normal(size=16000), 16000)
    arguments = ["generate", "--image", str(tmp_path / "face.png"), "--audio", str(tmp_path / "voice.wav")]
    arguments += ["-o", str(tmp_path / "out.mp4"), "--checkpoint", str(checkpoint), "--steps", "1"]
    assert main(arguments) == 0
    assert read_video(tmp_path / "out.mp4")[0].shape == (16, 32, 32, 3)
    assert main([*arguments, "--guidance", "2"]) == 2
    assert "--guidance is for checkpoints of Wan-S2V, " in capsys.readouterr().err


def test_it_is_planned(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "toy_tiny"]) == 0
    preset = capsys.readouterr().out
    assert "32 x 32, 8 frames, 2 steps, 1 prediction per step" in preset
    assert main(["plan", "--checkpoint", str(checkpoint), "--frames", "16"]) == 0
    assert "autoencoder" in capsys.readouterr().out
    assert "autoencoder" not in preset


def test_its_videos_are_encoded(checkpoint: Path, tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
    voice = 0.1 * np.random.default_rng(1).normal(size=20_000).astype(np.float32)
    with VideoWriter(tmp_path / "v.mp4", 16, (32, 32), audio=voice) as writer:
        writer.write(video)
    (tmp_path / "videos.csv").write_text("video\nv.mp4\n")
    arguments = ["precompute", "--manifest", str(tmp_path / "videos.csv"), "--checkpoint", str(checkpoint)]
    arguments += ["-o", str(tmp_path / "shards"), "--clip-frames", "8", "--max-area", "1024", "--multiple", "16"]
    assert main([*arguments, "--device", "cpu"]) == 0
    shards = PrecomputedShards(tmp_path / "shards")
    assert len(shards) == 3  # 8, 8 and 4 frames
    sample = shards.sample(1, np.random.default_rng(0), ClipRequest())
    assert sample.latents.shape == (16, 2, 4, 4)
    assert sample.audio is not None
    assert sample.audio.shape == (2, 6, 8)
