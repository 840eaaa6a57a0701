# SPDX-License-Identifier: Apache-2.0
"""A folder of drawn videos to a judged video, by the five commands of docs/curate.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from forked import run, training
from needs import need_stages
from official import make_official

from talkingdit.cli.main import main
from talkingdit.data import ClipRequest
from talkingdit.data.shards import PrecomputedShards
from talkingdit.encoders.log_mel import normalise_loudness
from talkingdit.media.files import VideoWriter, read_video
from talkingdit.puppets import PORTRAIT, VOICE
from talkingdit.puppets.render import render
from talkingdit.puppets.visemes import visemes_from_audio
from talkingdit.puppets.world import Motion, Scene

SECONDS, FPS, SIDE = 3.0, 16, 160


def draw_videos(folder: Path) -> None:
    """Two people who speak, and a third whose voice is missing."""
    folder.mkdir()
    sound = normalise_loudness(soundfile.read(VOICE, dtype="float32")[0])[: round(SECONDS * 16000)]
    for number in range(3):
        rng = np.random.default_rng(number)
        visemes = visemes_from_audio(sound, FPS, round(SECONDS * FPS))
        motion = [Motion.random(rng, len(visemes), FPS)]
        pictures = render(Scene.random(rng), visemes.opening[None], visemes.width[None], motion, SIDE)
        with VideoWriter(folder / f"{number}.mp4", FPS, (SIDE, SIDE), audio=sound if number < 2 else None) as video:
            video.write(pictures)


@pytest.mark.slow
def test_from_a_folder_to_a_judged_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need_stages("people", "speech", "sync")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "training"))
    from s2v_run import PIPELINE, SHAPE, write_config

    draw_videos(tmp_path / "videos")
    start = make_official(tmp_path / "start", **SHAPE, audio_inject_layers=(0, 1), vae_dim=4, settings=PIPELINE)
    stages = ["picture", "people", "sharpness", "motion", "speech", "sync", "signature"]
    (tmp_path / "curate.toml").write_text(f"[watch]\ncut = 0\nstages = {json.dumps(stages)}\n")

    found = tmp_path / "found"
    command = ["curate", "--videos", str(tmp_path / "videos"), "-o", str(found)]
    assert main([*command, "--settings", str(tmp_path / "curate.toml")]) == 0
    assert "2 of 3 clips of 3 videos kept" in capsys.readouterr().out
    rows = [json.loads(line) for line in (found / "manifest.jsonl").read_text().splitlines()]
    assert [Path(row["video"]).stem for row in rows] == ["0", "1"]

    data = ["precompute", "--manifest", str(found / "manifest.jsonl"), "--checkpoint", str(start)]
    sizes = ["--max-area", "48x48", "--clip-frames", "16", "--min-frames", "8"]
    assert main([*data, "-o", str(tmp_path / "data"), *sizes]) == 0
    shards = PrecomputedShards(tmp_path / "data")
    assert len(shards) > 0
    shape = shards.shape(0)
    sample = shards.sample(0, np.random.default_rng(0), ClipRequest(frames=shape.frames))
    assert {"face", "lips", "lower_face"} <= set(sample.regions)
    assert {"global", "front"} <= set(sample.outside)

    config = write_config(tmp_path, "wan_s2v.toml", tmp_path / "tiny.toml", stages=1)
    said = tmp_path / "said"
    assert run(training, "--config", str(config), "--run.steps", "2", timeout=240, said=said) == 0, said.read_text()

    folder = Path(shutil.copytree(start, tmp_path / "whole"))
    for old in folder.glob("diffusion_pytorch_model*"):
        old.unlink()
    for new in (tmp_path / "run" / "model").iterdir():
        shutil.copy(new, folder)
    soundfile.write(tmp_path / "voice.wav", soundfile.read(VOICE)[0][:16000], 16000)
    made = tmp_path / "made"
    made.mkdir()
    files = ["--image", str(PORTRAIT), "--audio", str(tmp_path / "voice.wav"), "-o", str(made / "0.mp4")]
    more = ["--checkpoint", str(folder), "--prompt", "a person talks", "--max-area", "96x96"]
    assert main(["generate", *files, *more]) == 0
    assert len(read_video(made / "0.mp4")[0]) > 8

    judge = ["eval", "--generated", f"tiny={made}", "-o", str(tmp_path / "judged"), "--regions", "whole"]
    assert main([*judge, "--finder", "drawn", "--metrics", "motion_smoothness,dynamic_degree"]) == 0
    assert any((tmp_path / "judged").glob("*.html"))
