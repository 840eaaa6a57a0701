# SPDX-License-Identifier: Apache-2.0
"""A ComfyUI with the pack, and what its input folder holds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from contract import ComfyUI
from PIL import Image

from talkingdit.puppets.scenes import portrait_of
from talkingdit.puppets.world import Scene


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    host = ComfyUI(tmp_path_factory.mktemp("comfy") / "comfyui")
    fill(host.root / "input")
    (host.root / "models" / "loras").mkdir()
    known = dict(sys.modules)
    sys.modules.update(host.modules())
    host.load_pack()
    yield host
    for name in set(sys.modules) - set(known):
        if name.startswith(("comfy", "folder_paths")) or "integrations/comfyui" in name:
            del sys.modules[name]


def fill(folder: Path) -> None:
    """A drawn portrait, and a second of a voice in two channels."""
    rng = np.random.default_rng(0)
    Image.fromarray(portrait_of(Scene.random(rng), 128)).save(folder / "portrait.png")
    time = np.arange(24000) / 24000
    voice = 0.3 * np.sin(2 * np.pi * 160 * time) * (np.sin(2 * np.pi * 4 * time) > 0)
    soundfile.write(folder / "voice.wav", np.stack([voice, 0.5 * voice], axis=1), 24000, subtype="FLOAT")
