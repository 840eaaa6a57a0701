# SPDX-License-Identifier: Apache-2.0
"""A picture to a video with Wan I2V: from a folder to frames, in the geometry and with the conditions of the paper."""

import numpy as np
import pytest
import torch
from tiny_i2v import make_i2v, picture_model

from talkingdit import families, models
from talkingdit.autoencoders.streaming import to_video
from talkingdit.encoders.clip import PictureEncoder, official_state
from talkingdit.families.wan_i2v.options import Options
from talkingdit.families.wan_i2v.outline import Sampling
from talkingdit.families.wan_i2v.pipeline import WanI2VPipeline
from talkingdit.pipelines.long_video import generate_clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_i2v(tmp_path_factory.mktemp("i2v"))


@pytest.fixture(scope="module")
def pipeline(folder):
    assert families.of_folder(folder).name == "wan_i2v"
    return WanI2VPipeline(models.load_checkpoint(folder))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)


def conditions(pipeline, image, frames=20, **options):
    sampling = Sampling.of(Options(**options), pipeline.settings)
    return pipeline.conditions(image, "a woman", sampling, frames=frames, latents=1 + -(-(frames - 1) // 4))


def test_clips_make_as_many_frames_as_asked_for(pipeline, image):
    given = conditions(pipeline, image)
    clips = list(generate_clips(pipeline, given, 2))
    assert [clip.frames.shape[2] for clip in clips] == [13, 7]  # 1 + 4 * 3, and the rest of 20
    again = pipeline.clip(given, 1, clips[0].carry, last=True)
    assert torch.equal(again.frames, clips[1].frames)


def test_what_is_known_is_said_as_the_official_program_says_it(pipeline, image):
    given = conditions(pipeline, image)
    condition = pipeline.known_condition(given.first, given.pixels, 4)
    assert condition.shape == (1, 20, 4, 4, 6)
    assert condition[:, :4, 0].eq(1).all()
    assert condition[:, :4, 1:].eq(0).all()
    grey = torch.cat([to_video(image[None]), torch.zeros(1, 3, 12, 32, 48)], dim=2)
    assert torch.equal(condition[:, 4:], pipeline._vae.encode(grey))


def test_predictions_are_weighted_and_batching_changes_nothing(pipeline, image):
    given = conditions(pipeline, image, guidance=3.0)
    assert [branch.weight for branch in given.sampling.branches(0)] == [3.0, -2.0]
    apart = conditions(pipeline, image, guidance=3.0, sequential=True)
    both = pipeline.clip(given, 0, last=True).frames
    torch.testing.assert_close(pipeline.clip(apart, 0, last=True).frames, both, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(pipeline.clip(conditions(pipeline, image, guidance=1.0), 0, last=True).frames, both)


def test_features_of_pictures_are_the_same_from_the_official_file(image):
    model = picture_model(80)
    state, official = model.state_dict(), {}
    layers = model.config.num_hidden_layers
    for name, value in state.items():
        official[name.removeprefix("vision_model.")] = value
    renamed = {
        "visual.cls_embedding": official["embeddings.class_embedding"].view(1, 1, -1),
        "visual.pos_embedding": official["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": official["embeddings.patch_embedding.weight"],
        "visual.head": torch.zeros(80, 4),
        "textual.token_embedding.weight": torch.zeros(2, 2),
    }
    for end in ("weight", "bias"):
        renamed[f"visual.pre_norm.{end}"] = official[f"pre_layrnorm.{end}"]
        renamed[f"visual.post_norm.{end}"] = official[f"post_layernorm.{end}"]
        for i in range(layers):
            ours, theirs = f"encoder.layers.{i}.", f"visual.transformer.{i}."
            qkv = [official[f"{ours}self_attn.{part}_proj.{end}"] for part in "qkv"]
            renamed[f"{theirs}attn.to_qkv.{end}"] = torch.cat(qkv)
            renamed[f"{theirs}attn.proj.{end}"] = official[f"{ours}self_attn.out_proj.{end}"]
            for n in (1, 2):
                renamed[f"{theirs}norm{n}.{end}"] = official[f"{ours}layer_norm{n}.{end}"]
                renamed[f"{theirs}mlp.{2 * n - 2}.{end}"] = official[f"{ours}mlp.fc{n}.{end}"]
    back = official_state(renamed, "file")
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official)
    features = PictureEncoder(model).features(image[None])
    assert features.shape == (1, 5, 80)
