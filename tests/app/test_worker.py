# SPDX-License-Identifier: Apache-2.0
"""What the app's worker makes is what the command line makes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_checkpoint import make_checkpoint

from talkingdit.app.asked import Asked, Machine
from talkingdit.app.worker import Worker
from talkingdit.cli.main import main
from talkingdit.media.files import read_video


def test_a_lora_that_was_uploaded_is_on_the_model(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")
    parts = {"lora_A": (4, 48), "lora_B": (48, 4)}
    state = {f"blocks.0.self_attn.v.{name}.weight": torch.randn(shape) for name, shape in parts.items()}
    save_file(state, tmp_path / "style.safetensors")
    videos = []
    for name, lora in (("plain", []), ("styled", ["style.safetensors:0.5"])):
        folder = tmp_path / name
        folder.mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(folder / "image.png")
        soundfile.write(folder / "audio.wav", 0.3 * np.sin(np.arange(8000) * 0.05), 16_000)
        if lora:
            (folder / "style.safetensors").write_bytes((tmp_path / "style.safetensors").read_bytes())
        asked = Asked(image="image.png", audio="audio.wav", checkpoint=str(checkpoint), options={"lora": lora})
        told: list[dict[str, Any]] = []
        unheard: Any = SimpleNamespace(check=lambda: None)
        Worker(Machine(device="cpu"), told.append, unheard).run(folder, asked)
        videos.append(read_video(folder / "video.mp4")[0])
        assert told[-1] == {"done": 2, "total": 2}
    assert (videos[0] != videos[1]).any()
    files = [
        "--image",
        str(folder / "image.png"),
        "--audio",
        str(folder / "audio.wav"),
        "-o",
        str(tmp_path / "cli.mp4"),
    ]
    more = ["--checkpoint", str(checkpoint), "--device", "cpu", "--live"]
    assert main(["generate", *files, *more, "--lora", f"{tmp_path / 'style.safetensors'}:0.5"]) == 0
    np.testing.assert_array_equal(read_video(tmp_path / "cli.mp4")[0], videos[1])
