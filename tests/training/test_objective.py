# SPDX-License-Identifier: Apache-2.0
"""The loss of a micro-batch: by hand, independent of what a sample is batched with, and with every condition absent."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from official import random_transformer
from safetensors.torch import save_file

from talkingdit import families
from talkingdit.data.sample import Sample
from talkingdit.families.puppet.text import PromptEncoder
from talkingdit.families.wan_s2v.conditions import WanInputs
from training.batching import MicroBatch
from training.conditions import CONDITIONS, draw
from training.config import Config
from training.networks import Networks
from training.objective import empty_text, losses, prepare

SIZE = {
    **{"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 24, "text_len": 36},
    **{"audio_dim": 8, "audio_layers": 5, "audio_inject_layers": (0, 1)},
}
FRAMES, SIDE = 3, 4
HERE = SimpleNamespace(device=torch.device("cpu"), context=None)
FAMILY = families.get("puppet")
NEVER = {**{f"drop_{name}": 0.0 for name in CONDITIONS}, "history_noise": 0.0}


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return Networks(FAMILY, random_transformer(**SIZE), PromptEncoder(24, 36))


def stage_of(**sections):
    return Config(stage_tables=[sections]).stages[0]


def sample_of(index, frames=FRAMES, side=SIDE, **changes):
    g = torch.Generator().manual_seed(index)
    shapes = {"latents": (16, frames, side, side), "reference": (16, 1, side, side), "history": (16, 5, side, side)}
    shapes |= {"pose": (16, frames, side, side), "audio": (5, 8, 4 * frames), "audio_history": (5, 8, 7)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    region = (torch.rand(frames, side, side, generator=g) > 0.7).float()
    made = Sample(f"k{index}", f"source{index % 2}", caption="a happy person", regions={"mouth": region}, **tensors)
    return dataclasses.replace(made, **changes)


def batch_of(samples, numbers=None, packed=False, weights=None):
    return MicroBatch(samples, numbers or list(range(len(samples))), packed, weights or [])


def run(networks, samples, stage, **how):
    return losses(networks, batch_of(samples, **how), stage, 5, 0.0, HERE)


def test_the_loss_is_the_mean_square_of_the_velocity_error(networks):
    stage = stage_of(conditions=NEVER)
    sample = sample_of(0)
    item = prepare(sample, 0, stage, 5)
    sigma = item.draws.sigma
    noisy = (1 - sigma) * sample.latents.double() + sigma * item.noise.double()
    torch.testing.assert_close(item.clip.latents.double(), noisy, atol=1e-6, rtol=0)
    conditions = {
        name: getattr(sample, name)[None] for name in ("reference", "history", "pose", "audio", "audio_history")
    }
    text = networks.text_encoder.encode([sample.caption]).features
    with torch.no_grad():
        velocity = networks.transformer(
            noisy.float()[None], torch.tensor([1000 * sigma]), WanInputs(text, **conditions)
        )[0]
        found = run(networks, [sample], stage)
    expected = ((velocity.double() - (item.noise - sample.latents).double()) ** 2).mean()
    torch.testing.assert_close(found.each.double(), expected[None], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.total, found.each.sum())


def assorted():
    """Samples of one shape that lack different things."""
    return [
        sample_of(0),
        sample_of(1, history=None, audio_history=None),
        sample_of(2, audio=None, audio_history=None, pose=None),
        sample_of(3, reference=None, caption=""),
        sample_of(4, history=sample_of(4).history[:, -2:], audio_history=sample_of(4).audio_history[..., -3:]),
        sample_of(5, regions={}),
    ]


@pytest.mark.parametrize("number", [0, 40])
def test_a_samples_loss_does_not_depend_on_what_it_is_stacked_with(networks, number):
    half = {**{f"drop_{name}": 0.5 for name in CONDITIONS}, "prefix": 0.4, "prefix_latents": 1}
    stage = stage_of(conditions=half, objective={"regions": {"mouth": 8.0}})
    samples = assorted()
    numbers = list(range(number, number + len(samples)))
    with torch.no_grad():
        together = run(networks, samples, stage, numbers=numbers).each
        alone = [run(networks, [s], stage, numbers=[n]).each for s, n in zip(samples, numbers, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=2e-5, atol=1e-6)
    assert len({draw(s, n, stage, 5).kept for s, n in zip(samples, numbers, strict=True)}) > 2


def test_clean_prefix_latents_are_at_timestep_zero_and_out_of_the_loss(networks):
    stage = stage_of(conditions={**NEVER, "prefix": 1.0, "prefix_latents": 2})
    sample = sample_of(0)
    seen = {}

    class Recorder(torch.nn.Module):
        def forward(self, latents, timestep, text, **_):
            seen.update(latents=latents, timestep=timestep)
            target = prepare(sample, 0, stage, 5).noise - sample.latents
            return target[None] + torch.tensor([9.0, 9.0, 2.0]).view(1, 1, 3, 1, 1)  # wrong where nothing counts, too

    found = run(Networks(FAMILY, Recorder(), networks.text_encoder), [sample], stage)
    torch.testing.assert_close(found.each, torch.tensor([4.0]))
    assert torch.equal(seen["latents"][0, :, :2], sample.latents[:, :2])
    assert not torch.equal(seen["latents"][0, :, 2], sample.latents[:, 2])
    sigma = prepare(sample, 0, stage, 5).draws.sigma
    torch.testing.assert_close(seen["timestep"], torch.tensor([[0.0, 0.0, 1000 * sigma]]))


def test_dropped_conditions_are_those_of_a_sample_without_them(networks):
    all_gone = stage_of(conditions={f"drop_{name}": 1.0 for name in CONDITIONS})
    bare = Sample("k", "s", latents=sample_of(0).latents)
    with torch.no_grad():
        torch.testing.assert_close(run(networks, [sample_of(0)], all_gone).each, run(networks, [bare], all_gone).each)


@pytest.mark.parametrize("packed", [False, True])
def test_without_the_past_sound_a_clip_is_trained_as_wan_s2v_generates_it(networks, packed):
    """The first column stands for what was before it, for each clip, whatever the others have."""
    samples = [sample_of(0), sample_of(1)]
    repeated = [dataclasses.replace(s, audio_history=s.audio[..., :1].expand(-1, -1, 5)) for s in samples]
    hears = stage_of(conditions=NEVER)
    deaf = stage_of(conditions={**NEVER, "audio_past": False})
    with torch.no_grad():
        found = run(networks, samples, deaf, packed=packed).each
        torch.testing.assert_close(found, run(networks, repeated, hears, packed=packed).each)
        assert (found != run(networks, samples, hears, packed=packed).each).all()


def test_an_image_is_a_video_of_one_latent_without_audio(networks):
    image = sample_of(0, frames=1, audio=None, audio_history=None, history=None, pose=None, kind="image")
    found = run(networks, [image], stage_of())
    assert found.parts["loss/without_audio"][1] == 1
    found.total.backward()
    assert torch.isfinite(found.each).all()


def test_text_features_stand_for_captions_and_the_empty_prompt_has_a_file(networks, tmp_path):
    features = torch.randn(5, 24)
    precomputed = Networks(FAMILY, networks.transformer)
    sample = sample_of(0, text=features)
    keeps = stage_of(conditions=NEVER)
    with torch.no_grad():
        given = run(precomputed, [sample], keeps).each
        assert not torch.equal(given, run(precomputed, [sample_of(0, text=features + 1)], keeps).each)
        dropping = stage_of(conditions={**NEVER, "drop_text": 1.0})
        none = run(precomputed, [sample], dropping).each
        torch.testing.assert_close(none, run(precomputed, [sample_of(0, text=torch.zeros(3, 24))], keeps).each)
        save_file({"text": features.half()}, tmp_path / "empty.safetensors")
        filed = stage_of(conditions={**NEVER, "drop_text": 1.0, "empty_text": str(tmp_path / "empty.safetensors")})
        torch.testing.assert_close(run(precomputed, [sample], filed).each, given, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="source0: sample k0 has a caption but no text features; precompute them, or"):
        run(precomputed, [sample_of(0)], keeps)
    with pytest.raises(ValueError, match=r"empty_text: .* must hold one tensor \[L, 32\], got \[\[5, 24\]\]"):
        empty_text(tmp_path / "empty.safetensors", 32)
    with pytest.raises(ValueError, match=r"conditions\.empty_text: .*none\.safetensors cannot be read"):
        empty_text(tmp_path / "none.safetensors", 24)


def test_a_prompt_encoder_is_trained_along(networks):
    networks.zero_grad()
    run(networks, [sample_of(0)], stage_of(conditions=NEVER)).total.backward()
    assert networks.text_encoder.embedding.weight.grad.abs().max() > 0


def test_parts_of_the_loss_add_up_and_stand_ins_count_nowhere(networks):
    samples = assorted()
    with torch.no_grad():
        found = run(networks, samples, stage_of(conditions=NEVER), weights=[1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    assert found.count == 5
    assert found.each[2] == 0
    groups = ("loss/with_audio", "loss/without_audio"), ("loss/first_clip", "loss/later_clip")
    groups += (("loss/source_source0", "loss/source_source1"), tuple(f"loss/noise_{i}of4" for i in (1, 2, 3, 4)))
    for tags in groups:
        sums = [found.parts[tag] for tag in tags if tag in found.parts]
        assert sum(count for _, count in sums) == 5
        torch.testing.assert_close(sum(total for total, _ in sums), found.total)
    assert found.parts["loss/first_clip"][1] == 1
    assert "loss/without_audio" not in found.parts  # the only one without stands in


def test_what_cannot_be_trained_is_said(networks):
    with pytest.raises(ValueError, match=r"samples of different shapes cannot be stacked, got .*3, 4, 4.*3, 6, 6"):
        run(networks, [sample_of(0), sample_of(1, side=6)], stage_of())
    with pytest.raises(
        ValueError, match=r"stages\.train\.conditions\.anchors: models of drawn characters take no anchors"
    ):
        run(networks, [sample_of(0)], stage_of(conditions={"anchors": {"types": {"view": ["front"]}}}))
    with pytest.raises(ValueError, match="models of drawn characters do not have the task 'edit'"):
        run(networks, [sample_of(0)], stage_of(conditions={"tasks": {"generate": 1, "edit": 1}}))


@pytest.mark.parametrize("number", [0, 40])
def test_packed_samples_of_any_size_have_the_losses_and_gradients_they_have_alone(networks, number):
    half = {**{f"drop_{name}": 0.5 for name in CONDITIONS}, "prefix": 0.4, "prefix_latents": 1}
    stage = stage_of(conditions=half, objective={"regions": {"mouth": 8.0}})
    image = sample_of(7, frames=1, audio=None, audio_history=None, pose=None, kind="image")
    samples = [*assorted(), sample_of(6, frames=2, side=6), image]
    numbers = list(range(number, number + len(samples)))
    networks.zero_grad()
    packed = run(networks, samples, stage, numbers=numbers, packed=True)
    packed.total.backward()
    found = {name: p.grad for name, p in networks.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    networks.zero_grad()
    alone = [run(networks, [sample], stage, numbers=[n]) for sample, n in zip(samples, numbers, strict=True)]
    torch.testing.assert_close(packed.each, torch.cat([one.each for one in alone]), rtol=2e-5, atol=1e-6)
    sum(one.total for one in alone).backward()
    for name, parameter in networks.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max() + 1e-3))
