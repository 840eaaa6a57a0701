# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint, a portrait and a voice of three clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from api_world import RATE, World
from PIL import Image
from safetensors.torch import save_file
from tiny_checkpoint import make_checkpoint

import talkingdit
from talkingdit.media.files import VideoWriter


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    face = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    voice = (0.1 * np.random.default_rng(1).normal(size=20000)).astype(np.float32)
    Image.fromarray(face).save(folder / "face.png")
    soundfile.write(folder / "voice.wav", voice, RATE, subtype="FLOAT")
    torch.manual_seed(1)
    state = {}
    for module, (rows, columns) in {"blocks.0.self_attn.v": (48, 48), "blocks.1.ffn.2": (48, 64)}.items():
        state[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(4, columns)
        state[f"diffusion_model.{module}.lora_B.weight"] = torch.randn(rows, 4)
    save_file(state, folder / "style.safetensors")
    return World(folder, make_checkpoint(folder / "checkpoint"), face, voice)


@pytest.fixture
def pipe(world: World) -> talkingdit.TalkingPipeline:
    return talkingdit.TalkingPipeline.from_pretrained(world.checkpoint)


@pytest.fixture(scope="session")
def whole(world: World) -> np.ndarray:
    """The frames of a call that nobody disturbs."""
    return talkingdit.TalkingPipeline.from_pretrained(world.checkpoint)(**world.given).frames.copy()


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where things lie that go with their owner."""
    import tempfile

    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("talkingdit.api.materials.ScratchFolder", lambda: tempfile.TemporaryDirectory(dir=folder))
    return folder


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Frames as they go into files, before they are compressed."""
    found: list[np.ndarray] = []
    write = VideoWriter.write

    def record(self: VideoWriter, frames: np.ndarray) -> None:
        found.append(np.array(frames))
        write(self, frames)

    monkeypatch.setattr(VideoWriter, "write", record)
    return found
