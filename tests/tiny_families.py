# SPDX-License-Identifier: Apache-2.0
"""For every family a whole tiny checkpoint, in folder/model, and what to ask of a pipeline with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from official import make_official
from tiny_avatar import save_released
from tiny_i2v import make_i2v
from tiny_skyreels import make_skyreels, write_scene

FACE = np.tile(np.linspace(40, 200, 64).astype(np.uint8)[:, None, None], (1, 96, 3))
VOICE = ((0.2 * np.sin(np.arange(6400) * 0.08)).astype(np.float32), 16000)


def s2v(folder: Path) -> dict[str, Any]:
    make_official(folder / "model", vae_dim=4, shards=1)
    return {"image": FACE, "audio": VOICE, "max_area": 64 * 64, "clip_frames": 8, "steps": 2}


def avatar(folder: Path) -> dict[str, Any]:
    save_released(folder / "model")
    settings = {"window": 5, "shift_offset": 2, "steps": 2, "size_multiple": 16, "early_steps": 1}
    (folder / "model" / "ckpts" / "pipeline.json").write_text(json.dumps(settings))
    boxes = ((0, 0, 48, 64), (48, 0, 96, 64))
    speakers = [{"name": str(n), "voice": VOICE, "box": box} for n, box in enumerate(boxes)]
    return {"image": FACE, "speakers": speakers, "size": (32, 64)}


def gloria(folder: Path) -> dict[str, Any]:
    widths = {"audio_dim": 16, "audio_layers": 25, "audio_width": 12, "audio_inject_layers": (0,)}
    settings = {"prefix_latents": 2, "anchor_area": 32 * 48, "guidance": 2.0, "audio_guidance": 3.0}
    make_i2v(folder / "model", "gloria_tiny", settings, **widths)
    return {"image": FACE, "audio": VOICE, "anchors": {"view/back": FACE[::-1]}, "max_area": 64 * 64, "steps": 2}


def skyreels(folder: Path) -> dict[str, Any]:
    make_skyreels(folder / "model")
    write_scene(folder / "in.mp4", 6)
    return {"video": folder / "in.mp4", "mask": "16,16,80,60", "audio": VOICE, "windows": 2, "steps": 2}
