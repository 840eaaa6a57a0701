# SPDX-License-Identifier: Apache-2.0
"""Training clips of SkyReels-Audio are what generation gives its model, of both tasks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import draw as drawn_frames
from clip_files import voice, write_video
from tiny_i2v import picture_model
from tiny_s2v import Voice, Words, make_vae

from talkingdit import families, models
from talkingdit.data.cutting import Cut, open_item
from talkingdit.data.manifest import read_manifest
from talkingdit.data.probe import Probes
from talkingdit.data.sample import Sample, flaw
from talkingdit.encoders.clip import PictureEncoder
from talkingdit.families.skyreels_audio.checkpoint import SkyReelsAudioSettings
from talkingdit.families.skyreels_audio.clips import encode_clip
from talkingdit.families.skyreels_audio.known import Given
from talkingdit.families.skyreels_audio.pipeline import SkyReelsAudioPipeline, _columns
from talkingdit.families.skyreels_audio.train import EDIT, model_clip, velocities
from talkingdit.families.training import EDITED, TrainBatch, TrainClip
from talkingdit.families.wan_i2v.clips import PictureEncoders
from talkingdit.media.files import read_video

CPU = torch.device("cpu")
SMALL = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=12, text_len=6, image_dim=20)
SMALL |= dict(audio_dim=10, audio_inject_layers=(0, 1))
SIZE = (32, 48)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = models.load("skyreels_audio_tiny", config=SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2)
    return model.requires_grad_(False)


def edited(**changes) -> TrainClip:
    made = torch.zeros(3, 4, 6)
    made[:, 2:, 1:4] = 1
    given = dict(
        latents=draw(16, 3, 4, 6), timestep=torch.full((3,), 400.0), reference=draw(16, 1, 4, 6), image=draw(5, 20),
        audio=draw(2, 10, 12), task=EDIT, given=draw(16, 3, 4, 6, seed=9), regions={EDITED: made},
    )  # fmt: skip
    return TrainClip(**given | changes)


def batch(*clips, packed):
    return TrainBatch(clips=clips, texts=[draw(4, 12) for _ in clips], packed=packed, device=CPU)


def test_a_window_of_generation_is_given_what_training_gives(model) -> None:
    clip = edited()
    trained = model_clip(model, clip, draw(3, 12), CPU)
    whole = Given(
        torch.cat([clip.reference, clip.given], 1)[None], torch.cat([torch.zeros(1, 4, 6), clip.regions[EDITED]])
    )
    condition = whole.condition(torch.arange(4), clip.reference[None], 4)
    assert torch.equal(trained.inputs.condition, condition)
    assert trained.held == 1
    columns = _columns(torch.cat([clip.audio[..., :1], clip.audio], -1), 0, 4)
    assert torch.equal(trained.inputs.audio[0], columns)

    pipeline = SkyReelsAudioPipeline.__new__(SkyReelsAudioPipeline)
    pipeline.checkpoint = type("Holder", (), {"transformer": model})()
    pipeline.settings = families.get("skyreels_audio").checkpoint.read_settings(Path("nowhere"))
    animated = model_clip(model, edited(task="animate"), draw(3, 12), CPU)
    assert torch.equal(animated.inputs.condition, pipeline.known_condition(clip.reference[None], None, 4))
    for changes in ({"reference": None}, {"given": None}, {"regions": {}}):
        other = edited(**changes)
        plain = model_clip(model, dataclasses.replace(other, task="animate"), draw(3, 12), CPU)
        assert torch.equal(model_clip(model, other, draw(3, 12), CPU).inputs.condition, plain.inputs.condition)


def test_a_sample_does_not_depend_on_its_batch_and_every_weight_has_a_gradient(model) -> None:
    both = edited(), edited(task="animate", audio=None, latents=draw(16, 3, 4, 6, seed=5))
    alone = [velocities(model, batch(clip, packed=False))[0] for clip in both]
    stacked, packed = velocities(model, batch(*both, packed=False)), velocities(model, batch(*both, packed=True))
    for one, two, three in zip(alone, stacked, packed, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], velocities(model, batch(edited(task="animate"), packed=False))[0], atol=1e-3)
    model.requires_grad_(True)
    try:
        bare = TrainClip(latents=draw(16, 2, 4, 6), timestep=torch.full((2,), 300.0))
        sum(v.square().sum() for v in velocities(model, batch(bare, packed=True))).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
    finally:
        model.requires_grad_(False)
        model.zero_grad()


@pytest.fixture(scope="module")
def encoders() -> PictureEncoders:
    torch.manual_seed(0)
    settings, image = SkyReelsAudioSettings(fps=16), PictureEncoder(picture_model())
    return PictureEncoders(make_vae().requires_grad_(False), settings, Words(), Voice(), image=image)


def sample_of(folder: Path, encoders: PictureEncoders, row: dict) -> Sample:
    write_video(folder / "v.mp4", drawn_frames(40, SIZE), 16, voice(40 / 16))
    (folder / "m.jsonl").write_text(json.dumps({"video": "v.mp4", "caption": "a person talks", **row}) + "\n")
    entry = read_manifest(folder / "m.jsonl").entries[0]
    item = open_item(entry, Probes(folder / "m.jsonl"), 16)
    return encode_clip(item, Cut(5, 16), SIZE, encoders, np.random.default_rng(0), "videos")


def test_the_lower_face_of_a_training_clip_is_grey_behind_its_first_frame(
    tmp_path: Path, encoders: PictureEncoders
) -> None:
    sample = sample_of(tmp_path, encoders, {"regions": {"lower_face": [0.2, 0.55, 0.6, 0.9]}})
    frames = read_video(tmp_path / "v.mp4")[0]
    video = torch.from_numpy(frames[4:21]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    grey = video.clone()
    grey[:, :, 1:, 16:32, 8:32] = 0  # all cells of 8 pixels that the box touches
    assert sample.given is not None
    torch.testing.assert_close(sample.given, encoders.latents(grey)[:, 1:])
    wanted = torch.zeros(4, 4, 6)
    wanted[:, 2:, 1:4] = 1
    assert torch.equal(sample.regions["lower_face"], wanted)
    assert flaw(sample) is None
    assert sample_of(tmp_path, encoders, {}).given is None
