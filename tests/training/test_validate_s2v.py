# SPDX-License-Identifier: Apache-2.0
"""Videos of a Wan-S2V model while it trains: the same from one process and from several, and what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clip_files import write_voice
from official import make_official
from s2v_run import PIPELINE, SHAPE, SIZES

from talkingdit.autoencoders.streaming import to_frames
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.options import Options
from talkingdit.families.wan_s2v.outline import Sampling
from talkingdit.families.wan_s2v.pipeline import WanS2VPipeline
from talkingdit.families.wan_s2v.validate import WanS2VValidator, motion_loudness, read_cases
from talkingdit.media.files import read_audio, read_image, read_video
from talkingdit.media.framing import fit_image
from talkingdit.models import load_checkpoint
from talkingdit.pipelines.long_video import generate_clips
from training import parallel
from training.build import sharded_networks
from training.checks import check_sample
from training.config import Config
from training.family import train_run
from training.metrics import Writer
from training.sections import SampleConfig
from training.validate import validate as run_validation


def test_a_mouth_that_moves_with_the_voice_is_told_from_one_that_does_not() -> None:
    rng = np.random.default_rng(0)
    steps = rng.random(80)
    carrier = np.sin(np.arange(80 * 1000) * 0.3)
    sound = (np.repeat(steps, 1000) * carrier * 0.3).astype(np.float32)

    def wave(amounts: np.ndarray, rows: slice) -> np.ndarray:
        """Brightness that goes up or down by the amount of each picture, whichever way there is more room."""
        pictures = np.full((80, 16, 16, 3), 100, np.uint8)
        level = 100.0
        for picture, amount in zip(pictures, amounts, strict=True):
            level += 100 * amount * (1 if level < 128 else -1)
            picture[rows] = int(level)
        return pictures

    low, high = slice(8, 16), slice(0, 8)
    together = motion_loudness(wave(steps, low), sound, 16)
    apart = motion_loudness(wave(rng.random(80), low), sound, 16)
    assert together is not None
    assert apart is not None
    assert together > 0.95
    assert abs(apart) < 0.3
    assert motion_loudness(wave(steps, high), sound, 16) is None  # only the upper half moves
    assert motion_loudness(wave(steps, low), np.zeros(80_000, np.float32), 16) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no case"),
        ("{", r"cases\.jsonl:1: expected a JSON object, got '{'"),
        ('\n{"image": "a.png"}', r"cases\.jsonl:2: a case has image, audio and perhaps prompt, got"),
        ('{"image": "a.png", "audio": "a.wav", "promt": ""}', r"cases\.jsonl:1: a case has image, audio and perhaps"),
    ],
)
def test_a_wrong_manifest_is_told_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cases.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_cases(tmp_path / "cases.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "sample.steps must be at least 1, got 0"),
        ({"seconds": 0.0}, "sample.seconds must be over 0, got 0"),
        ({"cases": Path("c")}, "sample.cases and sample.encoders go together, got only cases"),
        ({"encoders": Path("c")}, "sample.cases and sample.encoders go together, got only encoders"),
        (
            {"cases": Path("c"), "encoders": Path("e")},
            "sample.text_guidance and sample.audio_guidance must be equal with sample.cases, .* got 1 and 2",
        ),
    ],
)
def test_a_validation_that_makes_no_sense_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sample(SampleConfig(**changes))


def make_config(root: Path) -> Config:
    make_official(root / "start", **SHAPE, audio_inject_layers=(0, 1), vae_dim=4, settings=PIPELINE)
    picture = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)
    rows = []
    for name, seconds in (("anna", 3.0), ("ben", 0.8)):
        cv2.imwrite(str(root / f"{name}.png"), picture)
        write_voice(root / f"{name}.wav", seconds)
        rows.append({"image": f"{name}.png", "audio": f"{name}.wav", "prompt": "a woman talks"})
    (root / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = Config()
    config.run.out, config.run.device = root / "run", "cpu"
    config.model.preset, config.model.settings, config.model.clip_latents = "wan_s2v_14b", SIZES, 4
    config.model.start, config.model.text_encoder = root / "start", "none"
    config.parallel.precision, config.log.tensorboard = "fp32", False
    config.sample = SampleConfig(
        steps=1, text_guidance=3.0, audio_guidance=3.0, seconds=1.5, max_area=48 * 48,
        cases=root / "cases.jsonl", encoders=root / "start",
    )  # fmt: skip
    config.objective.shift = 3.0
    return config


class Recorder(Writer):
    """Pictures before they are compressed, which differs from run to run."""

    def __init__(self) -> None:
        self.pictures: dict[str, torch.Tensor] = {}
        self.values: dict[str, float] = {}

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.values |= values

    def frames(self, name: str, frames: torch.Tensor, step: int) -> None:
        self.pictures[name] = frames.permute(0, 2, 3, 1)


def validate(config: Config, out: Path, axes: dict[str, int]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    config.run.out = out
    for axis, size in axes.items():
        setattr(config.parallel, axis, size)
    here = parallel.start(config.parallel, "cpu")
    networks = sharded_networks(config, here, resumes=False).eval()
    writer = Recorder()
    validator = WanS2VValidator(train_run(config), here.device, here.context)
    found = run_validation(validator, networks, writer if here.rank == 0 else None, 7)
    assert writer.values == {f"validation/{name}": value for name, value in found.items()}
    return found, writer.pictures


@pytest.mark.slow
def test_the_videos_are_those_of_the_pipeline_on_any_layout(tmp_path: Path, processes: Any) -> None:
    config = make_config(tmp_path)
    [(alone, pictures)] = processes(1, validate, config, tmp_path / "one", {}, timeout=120)
    (together, others), nothing = processes(2, validate, config, tmp_path / "two", {"ulysses": 2}, timeout=120)
    assert nothing == ({}, {})
    assert together["motion_loudness_r"] == pytest.approx(alone["motion_loudness_r"], abs=0.01)
    assert set(pictures) == {"validation/case0", "validation/case1"}
    for name, shown in pictures.items():
        assert (shown.int() - others[name].int()).abs().max() <= 1
    names = ["step-00000007-case0.mp4", "step-00000007-case1.mp4"]
    assert sorted(path.name for path in (tmp_path / "one" / "validation").glob("*.mp4")) == names
    video, heard, fps, _ = read_video(tmp_path / "one" / "validation" / names[0])
    assert (len(video), fps) == (24, 16)
    assert heard is not None

    checkpoint = load_checkpoint(tmp_path / "start", torch.float32, "cpu")
    pipeline = WanS2VPipeline(checkpoint)
    size = (video.shape[1], video.shape[2])
    image, _ = fit_image(read_image(tmp_path / "anna.png"), size)
    sound = read_audio(tmp_path / "anna.wav")[:24_000]
    features = checkpoint.audio_encoder.features(sound, 32)
    sampling = Sampling.of(Options(steps=1, guidance=3.0, shift=3.0, clip_frames=16), checkpoint.settings)
    conditions = pipeline.conditions(image, "a woman talks", sampling, features, audio_frames=24)
    clips = generate_clips(pipeline, conditions, conditions.clips)
    expected = np.concatenate([to_frames(clip.frames) for clip in clips])
    expected = np.concatenate([expected[:1]] * 3 + [expected])[::3]
    assert np.abs(pictures["validation/case0"].numpy().astype(int) - expected).max() <= 1


@pytest.mark.slow
def test_cases_are_encoded_once(tmp_path: Path, processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    config.sample.seconds = 0.5
    processes(1, validate, config, tmp_path / "run", {})
    kept = tmp_path / "run" / "validation" / "cases" / "case0.safetensors"
    before = kept.stat().st_mtime_ns
    for part in ("models_t5_umt5-xxl-enc-bf16.pth", "wav2vec2-large-xlsr-53-english/model.safetensors"):
        (tmp_path / "start" / part).write_bytes(b"not needed any more")
    processes(1, validate, config, tmp_path / "run", {})
    assert kept.stat().st_mtime_ns == before
