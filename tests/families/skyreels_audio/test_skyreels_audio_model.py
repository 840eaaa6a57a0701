# SPDX-License-Identifier: Apache-2.0
"""The SkyReels-Audio transformer: its base where nothing is heard, the paper's attention where something is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from talkingdit import models
from talkingdit.cli.main import main
from talkingdit.errors import UserError
from talkingdit.families import of_preset
from talkingdit.families.skyreels_audio.blocks import AudioRopeAttention
from talkingdit.families.skyreels_audio.load import load, loads
from talkingdit.families.wan_i2v.conditions import WanI2VInputs
from talkingdit.families.wan_s2v.blocks import BlockInputs
from talkingdit.families.wan_s2v.sequence import ClipSpan, sequence_shard
from talkingdit.models import preset

SMALL = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=12, text_len=6, image_dim=20)
SMALL |= dict(audio_dim=10, audio_inject_layers=(0, 1))


def tiny(**changes):
    """A model with weights that all do something."""
    torch.manual_seed(0)
    model = models.load("skyreels_audio_tiny", config=SMALL | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2)
    return model.requires_grad_(False)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def given(batch=2, frames=3, height=8, width=12, **changes):
    whole = dict(
        text=draw(batch, 6, 12),
        condition=draw(batch, 20, frames, height, width),
        image=draw(batch, 5, 20),
        audio=draw(batch, 2, 10, 4 * frames),
    )
    return draw(batch, 16, frames, height, width), torch.tensor([700.0, 31.0][:batch]), WanI2VInputs(**whole | changes)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.fixture(scope="module")
def model():
    return tiny()


def turned(x: Tensor, times: Tensor) -> Tensor:
    angle = times[:, None].double() * 10000.0 ** (-torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[None, :, None]).flatten(-2)


@pytest.mark.parametrize("rope", [True, False])
def test_a_block_hears_the_one_sequence_of_audio_tokens_with_rotary_time(model, rope) -> None:
    torch.manual_seed(2)
    frames, per_frame, each = 3, 5, 8
    module = AudioRopeAttention(48, 2, 1e-6, each, None, 10000.0 if rope else 0.0).double()
    grid = (frames, 1, per_frame)
    shard = sequence_shard([ClipSpan(0, grid, frames * per_frame + 4)])  # and four tokens that hear nothing
    y, tokens = torch.randn(2, 19, 48).double(), torch.randn(2, frames * each, 48).double()
    from talkingdit.families.skyreels_audio.blocks import heard

    (hears,) = heard((frames,), each, None)
    got = module(y, tokens[:, hears.tokens], BlockInputs(groups=[19], layout=None, shard=shard))

    q, (k, v) = module.query(y[:, :15]), module.key_value(tokens)
    if rope:
        q = turned(q, (torch.arange(15) // per_frame) * each + (each - 1) / 2)
        k = turned(k, torch.arange(frames * each))
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(got[:, :15], module.o(out.flatten(2)))
    assert not got[:, 15:].any()


def test_a_new_model_is_its_video_model_whatever_it_hears():
    model = models.load("skyreels_audio_tiny", config=SMALL)
    base = models.load(
        "wan_i2v_tiny",
        config={name: value for name, value in SMALL.items() if not name.startswith("audio")},
    )
    state = {name: value for name, value in model.state_dict().items() if "audio" not in name}
    state["head.head.weight"] = model.state_dict()["head.head.weight"].normal_(std=0.2)
    base.load_state_dict(state)
    latents, timestep, inputs = given()
    with torch.no_grad():
        silent = base(latents, timestep, WanI2VInputs(inputs.text, inputs.condition, inputs.image))
        close(model(latents, timestep, inputs), silent)


def test_sound_moves_what_hears_it_and_silence_is_zeros(model):
    latents, timestep, inputs = given()
    heard = model(latents, timestep, inputs)
    silence = model(latents, timestep, given(audio=None)[2])
    zeros = model(latents, timestep, given(audio=torch.zeros(2, 2, 10, 12))[2])
    assert torch.equal(silence, zeros)
    assert (heard - silence).abs().max() > 1e-3
    swapped = model(latents, timestep, given(audio=inputs.audio.flip(-1))[2])
    without = tiny(audio_rope=False)
    # Without rotary time the order of the sounds in a clip does not matter at all.
    close(without(latents, timestep, given(audio=inputs.audio.flip(-1).flip(1))[2]), without(latents, timestep, inputs))
    assert (heard - swapped).abs().max() > 1e-3


def test_packed_clips_of_any_length_equal_each_alone(model):
    sizes = [(3, 4, 6), (5, 6, 4), (1, 4, 4)]
    clips = [
        given(1, *size, audio=None if i == 2 else draw(1, 2, 10, 4 * size[0]))[::2] for i, size in enumerate(sizes)
    ]
    times = [torch.tensor(500.0), torch.tensor(40.0), torch.tensor(900.0)]
    for window in (None, 1):
        one = model if window is None else tiny(audio_window=1)
        packed = one.denoise_packed([x[0] for x, _ in clips], times, [inputs for _, inputs in clips])
        for velocity, (x, inputs), time in zip(packed, clips, times, strict=True):
            close(velocity, one(x, time[None], inputs)[0])


def test_it_comes_back_from_a_folder_and_is_told_from_its_base(model, tmp_path):
    latents, timestep, inputs = given()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert loads(tmp_path)
    assert {name: again.config[name] for name in SMALL} == SMALL
    close(again(latents, timestep, inputs), model(latents, timestep, inputs))
    assert of_preset("skyreels_audio").name == "skyreels_audio"
    assert models.load(tmp_path).__class__ is model.__class__


def test_it_is_planned(capsys):
    assert main(["plan", "--preset", "skyreels_audio_tiny", "--seconds", "10"]) == 0
    shown = capsys.readouterr().out
    assert "speech encoder" not in shown  # it stands beside the parts that ship, whose features no network makes
    assert "fits" in shown
    assert main(["plan", "--preset", "skyreels_audio", "--seconds", "10"]) == 0
    assert "speech encoder" in capsys.readouterr().out


def test_what_does_not_fit_is_told(model):
    latents, timestep, inputs = given(audio=draw(2, 2, 10, 11))
    with pytest.raises(ValueError, match=r"audio must have shape \[2, 2, 10, 12\], got \[2, 2, 10, 11\]"):
        model(latents, timestep, inputs)
    with pytest.raises(ValueError, match="in_dim must have channels"):
        tiny(in_dim=32)
    with pytest.raises(UserError):
        load("skyreels_audio_nano")
    assert preset("skyreels_audio")["audio_inject_layers"] == tuple(range(40))
