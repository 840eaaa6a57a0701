# SPDX-License-Identifier: Apache-2.0
"""Training clips of Gloria: the frame before the clip is given, anchors are from all of the video."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from clip_files import draw, voice, write_video
from tiny_i2v import picture_model
from tiny_s2v import Voice, Words, make_vae

from talkingdit.autoencoders.streaming import to_video
from talkingdit.data.cutting import Cut, Cutting, open_item
from talkingdit.data.manifest import read_manifest
from talkingdit.data.on_the_fly import OnTheFly
from talkingdit.data.probe import Probes
from talkingdit.data.sample import ClipRequest, Sample, flaw
from talkingdit.data.shards import PrecomputedShards, ShardWriter
from talkingdit.encoders.clip import PictureEncoder
from talkingdit.families.gloria.checkpoint import GloriaSettings
from talkingdit.families.gloria.clips import DRAWN, encode_clip
from talkingdit.families.wan_i2v.clips import PictureEncoders
from talkingdit.media.files import read_video
from training.conditions import draw_anchors
from training.sections import AnchorsConfig

SIZE = (32, 48)


@pytest.fixture(scope="module")
def encoders() -> PictureEncoders:
    torch.manual_seed(0)
    settings = GloriaSettings(anchor_area=32 * 32)
    image = PictureEncoder(picture_model())
    return PictureEncoders(make_vae().requires_grad_(False), settings, Words(), Voice(), image=image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty frames with a voice; a view in the clip, one out of it, a face from a file."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "v.mp4", draw(40, SIZE), 16, voice(40 / 16))
    cv2.imwrite(str(folder / "smile.png"), np.full((20, 20, 3), 90, np.uint8))
    row = {"video": "v.mp4", "caption": "a person talks", "outside": {"back": [10 / 16, 30 / 16], "happy": "smile.png"}}
    (folder / "m.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def sample(folder: Path, encoders: PictureEncoders) -> Sample:
    entry = read_manifest(folder / "m.jsonl").entries[0]
    item = open_item(entry, Probes(folder / "m.jsonl"), 16)
    return encode_clip(item, Cut(5, 16), SIZE, encoders, np.random.default_rng(0), "videos")


def test_a_clip_is_what_generation_would_be_given(sample: Sample, folder: Path, encoders: PictureEncoders) -> None:
    frames = read_video(folder / "v.mp4")[0]
    whole = encoders.latents(frames[4:21])
    assert sample.reference is not None
    assert torch.equal(sample.reference, whole[:, :1])
    assert torch.equal(sample.latents, whole[:, 1:])
    assert torch.equal(sample.reference, encoders.latents(frames[4:5]))  # of the frame alone
    assert sample.image is not None
    assert sample.image.shape == (5, 16)
    assert sample.audio is not None
    assert sample.audio.shape[-1] == 16
    assert flaw(sample) is None


def test_anchors_are_from_the_clip_and_from_elsewhere(sample: Sample, folder: Path, encoders: PictureEncoders) -> None:
    frames = read_video(folder / "v.mp4")[0]
    assert {kind: value.shape[1:] for kind, value in sample.outside.items()} == {
        "global": (DRAWN, 4, 6),
        "back": (2, 4, 4),  # no more than 32 x 32 pixels
        "happy": (1, 4, 4),
    }
    assert sample.inside["back"].tolist() == [1, 0]
    assert sample.inside["happy"].tolist() == [0]
    stills = torch.cat([encoders.latents(to_video(frames[i : i + 1])) for i in range(40)], dim=1)
    for anchor in sample.outside["global"].unbind(1):  # each is a frame of the video
        assert (stills - anchor[:, None]).abs().amax((0, 2, 3)).min() < 1e-5


def test_the_ablation_draws_from_the_clip_alone(sample: Sample) -> None:
    config = AnchorsConfig(types={"view": ["back"], "expression": ["happy"]})
    video = {a.kind + str(a.index) for n in range(60) for a in draw_anchors(sample, config, 0, n, 0)}
    assert video == {"back0", "back1", "happy0"}
    config = dataclasses.replace(config, of="clip")
    clip = {a.kind + str(a.index) for n in range(60) for a in draw_anchors(sample, config, 0, n, 0)}
    assert clip == {"back0"}


def test_shards_keep_anchors_of_any_size(sample: Sample, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, 1 << 20)
    writer.add(sample, {"fps": 16}, torch.float32)
    writer.finish()
    again = PrecomputedShards(tmp_path).sample(0, np.random.default_rng(0), ClipRequest())
    found, wanted = dict(again.tensors()), dict(sample.tensors())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_clips_are_made_on_the_way_too(folder: Path, encoders: PictureEncoders) -> None:
    source = OnTheFly(folder / "m.jsonl", encoders, encode_clip, Cutting(16, 8, max_area=32 * 48, multiple=16))
    assert source.shape(0).history == 0
    found = source.sample(0, np.random.default_rng(1), ClipRequest(frames=2))
    assert found.latents.shape == (16, 2, 4, 6)
    assert found.kind == "video"
