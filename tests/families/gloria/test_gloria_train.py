# SPDX-License-Identifier: Apache-2.0
"""What becomes of a training batch of Gloria: the same for a sample, whatever it is batched with."""

from pathlib import Path

import pytest
import torch

from talkingdit import families, models
from talkingdit.families.gloria.pipeline import GloriaPipeline
from talkingdit.families.training import TrainAnchor, TrainBatch, TrainClip
from talkingdit.families.wan_i2v.train import model_clip, velocities

SMALL = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=12, text_len=6, image_dim=20)
SMALL |= dict(audio_inject_layers=(0,), audio_dim=8, audio_layers=3, audio_width=10)
CPU = torch.device("cpu")


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = models.load("gloria_tiny", config=SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2)
    return model.requires_grad_(False)


def clips():
    """One that begins a video, with two anchors of a view; one that goes on, with others and without picture."""
    shape = (16, 3, 4, 6)
    time = torch.full((3,), 400.0)
    back, left = (TrainAnchor("view", kind, draw(16, 1, 4, 4, seed=n)) for n, kind in enumerate(("back", "left")))
    happy = TrainAnchor("expression", "happy", draw(16, 1, 2, 4))
    first = TrainClip(
        latents=draw(*shape), timestep=time, reference=draw(16, 1, 4, 6), image=draw(5, 20), audio=draw(3, 8, 12),
        anchors=(back, left),
    )  # fmt: skip
    on = torch.tensor([0.0, 900.0, 900.0])
    second = TrainClip(latents=draw(*shape, seed=3), timestep=on, prefix=1, reference=draw(16, 1, 4, 6),
                       anchors=(happy, back))  # fmt: skip
    return first, second


def batch(*given, packed):
    texts = [draw(3 + i, 12, seed=i) for i in range(2)]
    chosen = [texts[0 if clip.prefix == 0 else 1] for clip in given]
    return TrainBatch(clips=given, texts=chosen, packed=packed, device=CPU)


def test_a_sample_does_not_depend_on_its_batch(model):
    both = clips()
    alone = [velocities(model, batch(clip, packed=False))[0] for clip in both]
    stacked, packed = velocities(model, batch(*both, packed=False)), velocities(model, batch(*both, packed=True))
    for one, two, three in zip(alone, stacked, packed, strict=True):
        assert one.shape == (16, 3, 4, 6)
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-4)


def test_every_weight_gets_a_gradient_whatever_a_batch_has(model):
    """Processes reduce the gradients of all weights, also where one of them had no audio or no anchors."""
    model.requires_grad_(True)
    try:
        for packed in (False, True):
            model.zero_grad()
            bare = TrainClip(latents=draw(16, 2, 4, 6), timestep=torch.full((2,), 300.0))
            sum(v.square().sum() for v in velocities(model, batch(bare, packed=packed))).backward()
            assert [name for name, p in model.named_parameters() if p.grad is None] == []
    finally:
        model.requires_grad_(False)


def test_a_chunk_of_generation_is_given_what_training_gives(model):
    """The same frames are known, at timestep 0 and in the same channels, behind a first frame or behind a prefix."""
    pipeline = GloriaPipeline.__new__(GloriaPipeline)
    pipeline.checkpoint = type("Holder", (), {"transformer": model})()
    pipeline.settings = families.get("gloria").checkpoint.read_settings(Path("nowhere"))
    first, second = clips()
    for clip, known in ((first, first.reference), (second, second.latents[:, :1])):
        trained = model_clip(model, clip, draw(3, 12), CPU)
        frames = trained.latents.shape[1]
        assert trained.held == known.shape[1] == 1
        assert torch.equal(trained.latents[:, :1], known)
        assert torch.equal(trained.inputs.condition, pipeline.known_condition(known[None], None, frames))
    assert trained.latents.shape[1] == 3  # one that goes on has no first frame in front


def test_places_of_anchors_are_those_of_generation(model):
    trained = model_clip(model, clips()[0], draw(3, 12), CPU)
    assert [extra.times for extra in trained.inputs.extra] == [[41.0], [42.0]]
