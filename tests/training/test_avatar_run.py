# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo-Avatar from a user's videos and pictures through both stages to a model that generation loads."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clip_files import draw, voice, write_video
from s2v_run import _toml, train
from tiny_avatar import TRANSFORMER, save_released

from talkingdit.cli.main import main
from talkingdit.data import ClipRequest
from talkingdit.data.shards import PrecomputedShards
from talkingdit.families.hunyuan_avatar.checkpoint import read_settings
from talkingdit.families.hunyuan_avatar.clips import HunyuanAvatarEncoders
from talkingdit.families.hunyuan_avatar.samples import sample_columns, split_text, voice_features
from talkingdit.families.hunyuan_avatar.train import velocities
from talkingdit.families.training import TrainBatch, TrainClip
from talkingdit.models import load
from training.config import read_toml, tomllib
from training.objective import prepare

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "hunyuan_avatar.toml"
SETTINGS = {**TRANSFORMER, "rope_dim_list": [8, 8, 8]}
PLACE = "ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt"


def tiny(**changes: Any) -> Any:
    from tiny_avatar import make_transformer

    return make_transformer(**changes)


def clip(config: Any, seed: int, frames: int = 3, **more: Any) -> TrainClip:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return TrainClip(
        latents=draw(16, frames, 4, 6),
        timestep=torch.full((frames,), 300.0 + seed),
        audio=draw(config.audio_blocks, config.audio_window * config.audio_channels, 4 * frames),
        reference=draw(16, 1, 4, 6),
        **more,
    )


def batch(clips: list[TrainClip], config: Any, packed: bool) -> TrainBatch:
    texts = [torch.randn(3 + i, config.text_states_dim) for i in range(len(clips))]
    texts[0][-1] = 0  # padding
    return TrainBatch(clips=clips, texts=texts, packed=packed, device=torch.device("cpu"))


def test_stacked_and_packed_clips_give_what_each_gives_alone() -> None:
    torch.manual_seed(0)
    model = tiny()
    clips = [clip(model.config, i, regions={"face": torch.rand(3, 4, 6)}) for i in range(2)]
    given = batch(clips, model.config, packed=False)
    with torch.no_grad():
        alone = [
            velocities(model, dataclasses.replace(given, clips=[c], texts=[t]))[0]
            for c, t in zip(clips, given.texts, strict=True)
        ]
        for packed in (False, True):
            for got, want in zip(velocities(model, dataclasses.replace(given, packed=packed)), alone, strict=True):
                assert torch.allclose(got, want, atol=1e-5)
        mixed = [clips[0], dataclasses.replace(clips[1], audio=None, reference=None)]
        got = velocities(model, dataclasses.replace(given, clips=mixed))
        assert torch.allclose(got[0], alone[0], atol=1e-5)


def test_voices_reach_the_faces_of_their_names() -> None:
    torch.manual_seed(0)
    model = tiny(depth_single_blocks=0)
    one = clip(model.config, 0)
    left = torch.zeros(3, 4, 6)
    left[..., :2] = 1
    voices = {"a": one.audio, "b": torch.randn_like(one.audio)}
    two = dataclasses.replace(one, audio=None, voices=voices, regions={"a": left, "b": left.flip(-1)})
    other = dataclasses.replace(two, voices=voices | {"b": -voices["b"]})
    given = batch([one], model.config, packed=False)
    with torch.no_grad():
        first, second = (velocities(model, dataclasses.replace(given, clips=[c]))[0] for c in (two, other))
    moved = (first - second).abs().amax((0, 1, 2))
    assert moved[:4].max() == 0 < moved[4:].min()


def test_features_and_text_of_a_sample() -> None:
    model = tiny()
    features = torch.randn(12, model.config.audio_window, model.config.audio_blocks, model.config.audio_channels)
    assert torch.equal(voice_features(model.config, sample_columns(features)), features[3:])
    text = torch.randn(4, model.config.text_states_dim)
    text[-1] = 0
    tokens, mask, pooled = split_text(model.config, text)
    assert mask.tolist() == [True, True, False]
    assert torch.equal(tokens, text[1:])
    assert torch.equal(pooled, text[0, : model.config.text_states_dim_2])


def test_pictures_of_emotions_reach_the_model_from_a_manifest(tmp_path: Path) -> None:
    """Two pictures that take turns, the second by a mask that moves; without the module they change nothing."""
    root = save_released(tmp_path / "avatar")
    (root / "ckpts" / "pipeline.json").write_text(json.dumps({"size_multiple": 16}))
    write_video(tmp_path / "a.mp4", draw(8, (32, 48)), 25, voice(8 / 25))
    turn = np.zeros((8, 32, 48, 3), np.uint8)
    turn[4:] = 255
    write_video(tmp_path / "late.mp4", turn, 25)
    cv2.imwrite(str(tmp_path / "smile.png"), draw(5, (32, 48))[4, ..., ::-1])
    row = {
        "video": "a.mp4",
        "caption": "a person talking",
        "outside": {"emotion": ["smile.png", 0.0]},
        "regions": {"emotion 0": [0, 0, 1, 1], "emotion 1": "late.mp4"},
    }
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    command = ["precompute", "--manifest", str(tmp_path / "m.jsonl"), "--checkpoint", str(root)]
    sizes = ["--max-area", "32x48", "--clip-frames", "8", "--min-frames", "8"]
    assert main([*command, "-o", str(tmp_path / "data"), *sizes]) == 0

    (values,) = tomllib.loads("".join(_commented(CONFIG.read_text())))["model"].values()
    assert values == {"emotion": True}  # what the configuration says to uncomment
    stage = read_toml(CONFIG).stages[0]
    stage = dataclasses.replace(
        stage, conditions=dataclasses.replace(stage.conditions, drop_text=0.0, drop_audio=0.0, drop_reference=0.0)
    )
    kept = PrecomputedShards(tmp_path / "data")
    sample = kept.sample(0, np.random.default_rng(0), ClipRequest())
    first, second = sample.outside["emotion"].unbind(1)
    encoders = HunyuanAvatarEncoders(root).load()
    wanted = encoders.stills(draw(5, (32, 48))[4:])[:, 0]
    assert torch.equal(first, wanted.bfloat16().float())
    assert not torch.equal(first, second)

    def velocity(model: Any, sample: Any) -> torch.Tensor:
        item = prepare(sample, 0, stage, seed=0).clip
        given = TrainBatch(clips=[item], texts=[sample.text], packed=False, device=torch.device("cpu"))
        with torch.no_grad():
            return velocities(model, given)[0]

    def without(*numbers: int) -> Any:
        pictures = sample.outside["emotion"].clone()
        pictures[:, list(numbers)] = 0
        return dataclasses.replace(sample, outside=sample.outside | {"emotion": pictures})

    shows = tiny(**values, depth_single_blocks=0)
    plain = velocity(shows, sample)
    for number in range(2):  # no attention follows the one adapter: a frame sees its own picture alone
        moved = (velocity(shows, without(number)) - plain).abs().amax((0, 2, 3)) > 1e-6
        assert moved.tolist() == [number == 0, number == 1]
    blind = tiny(depth_single_blocks=0)
    assert torch.equal(velocity(blind, sample), velocity(blind, without(0, 1)))


def _commented(text: str) -> Iterator[str]:
    """The lines of a configuration that a comment says to uncomment."""
    for line in text.splitlines():
        if line.startswith(("# [model.settings]", "# emotion")):
            yield line[2:] + "\n"


# ---- A run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two talking videos, one of them with a box round the face, and two pictures, prepared by the command."""
    root = save_released(tmp_path_factory.mktemp("avatar"))
    (root / "ckpts" / "pipeline.json").write_text(json.dumps({"size_multiple": 16}))
    for kind in ("audio", "image"):
        entries = []
        for number in range(2):
            entry: dict[str, Any] = {"video": f"{kind}{number}.mp4", "caption": "a person talking"}
            if kind == "audio":
                write_video(root / entry["video"], draw(16, (32, 48)), 25, voice(16 / 25))
                entry |= {"regions": {"face": [0.2, 0.2, 0.6, 0.6]}} if number else {}
            else:
                entry["video"] = f"{kind}{number}.png"
                cv2.imwrite(str(root / entry["video"]), draw(1, (32, 48))[0])
            entries.append(json.dumps(entry))
        (root / f"{kind}.jsonl").write_text("\n".join(entries) + "\n")
        command = ["precompute", "--manifest", str(root / f"{kind}.jsonl"), "--checkpoint", str(root)]
        sizes = ["--max-area", "32x48", "--clip-frames", "8", "--min-frames", "8"]
        assert main([*command, "-o", str(root / "data" / kind), *sizes]) == 0
    return root


def write_config(world: Path, file: Path) -> Path:
    """The shipped configuration made tiny: both stages, two steps each."""
    values = tomllib.loads(CONFIG.read_text())
    values["run"] |= {"out": str(file.parent / "run"), "threads": 1, "device": "cpu"}
    values["model"] |= {
        "preset": "hunyuan_avatar_tiny",
        "start": str(world / PLACE),
        "settings": SETTINGS,
        "clip_latents": 2,
    }
    values["parallel"] = {"precision": "fp32", "activation_checkpointing": "full"}
    values["checkpoint"] = {"every": 2}
    for source in values["data"]["sources"]:
        values["data"]["sources"][source]["path"] = str(world / "data" / source)
    values["data"] = {"workers": 0, "sources": values["data"]["sources"]}
    values["batch"] |= {"count": 2, "frames": [2, 1], "resolutions": []}
    values["optim"] |= {"warmup_steps": 1, "lr": 1e-3, "ema": 0.5, "eps": 1e-5}
    values["log"] = {"tensorboard": False}
    for stage in values["stages"]:
        stage["steps"] = 2
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_toml(values))
    return file


@pytest.mark.slow
def test_two_stages_on_two_processes_are_those_of_one(world: Path, tmp_path: Path, processes: Any) -> None:
    alone = write_config(world, tmp_path / "alone" / "tiny.toml")
    both = write_config(world, tmp_path / "both" / "tiny.toml")
    ((want, _),) = processes(1, train, alone, timeout=240)
    (got, _), _ = processes(2, train, both, {"ulysses": 2}, timeout=240)
    assert [line["step"] for line in want] == [1, 2, 3, 4]
    for mine, other in zip(got, want, strict=True):
        for name in ("loss", "gradient_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4), (mine["step"], name)
    model, start = load(tmp_path / "both" / "run" / "model"), load(world / PLACE, config=SETTINGS)
    assert model.config.rope_dim_list == (8, 8, 8)
    moved = [
        name for name, value in start.state_dict().items() if not torch.equal(value, model.state_dict()[name].float())
    ]
    assert {"audio_adapter_blocks.0.to_q.weight", "double_blocks.0.img_attn_qkv.weight"} <= set(moved)
    assert read_settings(tmp_path / "both" / "run" / "model").window == 2
    for (name, a), (_, b) in itertools.islice(
        zip(model.state_dict().items(), load(tmp_path / "alone" / "run" / "model").state_dict().items(), strict=True),
        40,
    ):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)
