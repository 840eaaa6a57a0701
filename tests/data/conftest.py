# SPDX-License-Identifier: Apache-2.0
"""Videos, a checkpoint, and what `talkingdit precompute` makes of them, for the tests of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clip_files import draw, voice, write_video, write_voice
from official import make_official
from PIL import Image
from precomputing import SETTINGS, make_job, run

from talkingdit.data.encoders import CheckpointEncoders
from talkingdit.families.wan_s2v.clips import encoders as encoders_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_official(
        tmp_path_factory.mktemp("checkpoint") / "tiny", num_layers=1, audio_inject_layers=(0,),
        audio_encoder_layers=2, vae_dim=4, settings=SETTINGS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoders(checkpoint: Path) -> CheckpointEncoders:
    return encoders_of(checkpoint)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos with voices; one has everything that a sample can have."""
    folder = tmp_path_factory.mktemp("videos")
    rows: list[dict[str, Any]] = []
    for number, frames in enumerate((16, 41, 20, 30)):
        write_video(folder / f"{number}.mp4", draw(frames), 16, voice(frames / 16))
        rows.append({"video": f"{number}.mp4", "caption": f"person {number} talks"})
    Image.fromarray(draw(5)[4]).save(folder / "face.png")
    write_video(folder / "pose.mp4", draw(16)[::-1], 16)
    write_voice(folder / "0.wav", 1.0)
    rows[0] |= {"reference": "face.png", "pose": "pose.mp4", "kind": "film", "regions": {"face": [0, 0, 0.5, 0.5]}}
    rows[0] |= {"outside": {"smile": ["face.png", 0.25]}, "audio": "0.wav"}
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def whole(videos: Path, encoders: CheckpointEncoders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of one run without trouble."""
    job = make_job(videos, encoders, tmp_path_factory.mktemp("out") / "whole")
    assert [step.broken for step in run(job)] == [0, 0, 0, 0]
    return job.out
