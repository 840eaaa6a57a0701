# SPDX-License-Identifier: Apache-2.0
"""Every switch of the Wan-S2V transformer against the official computation in float64, at many sizes.

The computation of `bench.official_style` is first held against numbers of the official program itself.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bench import official_style
from talkingdit.models import WanInputs, WanS2VModel

GOLDEN = Path(__file__).parents[2] / "golden" / "wan_s2v.safetensors"
SMALL = dict(
    dim=48,
    ffn_dim=56,
    num_heads=2,
    num_layers=3,
    freq_dim=16,
    text_dim=12,
    text_len=6,
    audio_dim=8,
    num_audio_token=4,
    audio_inject_layers=[0, 2],
    cond_dim=16,
    in_dim=16,
    out_dim=16,
    enable_adain=True,
    adain_mode="attn_norm",
    zero_timestep=True,
    enable_framepack=True,
    framepack_drop_mode="padd",
    add_last_motion=True,
)


def relative(a, b):
    return ((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt()).item()


@pytest.mark.parametrize("case", ["clip0_drop", "clip1_motion"])
def test_the_truth_equals_the_official_program(case):
    with safe_open(GOLDEN, "pt") as file:
        spec = json.loads(file.metadata()["spec"])
        tensors = {key.removeprefix("official/"): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {k.removeprefix("state/"): v.double() for k, v in tensors.items() if k.startswith("state/")}
    given = {k.rsplit("/", 1)[1]: v.double() for k, v in tensors.items() if k.startswith(f"{case}/in/")}
    out = official_style.forward(
        spec["config"],
        weights,
        given["x"],
        given["t"],
        given["context"],
        given["ref_latents"],
        given["motion_latents"],
        given["cond_states"],
        given["audio_input"],
        drop_motion=case == "clip0_drop",
    )
    assert relative(out[0], tensors[f"{case}/out/0"]) < 1e-6
    want = torch.view_as_complex(tensors["clip1_motion/mid/framepack_rope0"])
    _, places = official_style.packed_history(spec["config"], weights, given["motion_latents"], 2)
    assert (official_style.rotations(32, places)[:, 0] - want).abs().max() < 1e-12


def build(**changes):
    """A model with weights that do something, and the same weights in float64 by name."""
    config = SMALL | changes
    torch.manual_seed(0)
    model = WanS2VModel(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.15)
    return config, model, {name: value.double() for name, value in model.state_dict().items()}


def draw(config, batch=1, frames=2, height=16, width=8, past=19, text=4, silent=False):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    audio = normal(batch, 25, config["audio_dim"], 4 * frames)
    return dict(
        x=normal(batch, 16, frames, height, width),
        t=1000 * torch.rand(batch, generator=generator),
        context=normal(batch, text, config["text_dim"]),
        ref=normal(batch, 16, 1, height, width),
        motion=normal(batch, 16, past, height, width),
        pose=normal(batch, 16, frames, height, width),
        audio=audio * 0 if silent else audio,
    )


def ours(model, given, **settings):
    return model(
        given["x"],
        given["t"],
        WanInputs(
            given["context"],
            reference=given["ref"],
            history=given["motion"],
            pose=given["pose"],
            audio=given["audio"],
            **settings,
        ),
    )


def truth(config, weights, given, **settings):
    return official_style.forward(config, weights, **{k: v.double() for k, v in given.items()}, **settings)


def check(config, model, weights, given, add_last_motion=2, drop=False, motion_frames=(73, 19)):
    want = truth(config, weights, given, add_last_motion=add_last_motion, drop_motion=drop, motion_frames=motion_frames)
    assert relative(ours(model, given, add_last_motion=add_last_motion, drop_history=drop), want) < 1e-5
    wide = {k: v.double() for k, v in given.items()}
    exact = ours(model.double(), wide, add_last_motion=add_last_motion, drop_history=drop)
    assert exact.dtype == torch.float64
    assert relative(exact, want) < 1e-9


SWITCHES = {
    "released": {},
    "no_adain": dict(enable_adain=False),
    "other_adain_mode": dict(adain_mode="plain"),
    "drop": dict(framepack_drop_mode="drop"),
    "no_last_motion": dict(add_last_motion=False),
    "drop_no_last_motion": dict(add_last_motion=False, framepack_drop_mode="drop"),
    "one_timestep": dict(zero_timestep=False),
    "dense_history": dict(enable_framepack=False),
    "everything_else": dict(
        enable_adain=False, zero_timestep=False, enable_framepack=False, add_last_motion=False, num_audio_token=2
    ),
    "deaf": dict(audio_inject_layers=[]),
    "every_layer": dict(audio_inject_layers=[0, 1, 2], num_audio_token=1),
    "odd_pairs": dict(dim=44, eps=1e-3),
    "four_heads": dict(num_heads=4, text_len=4),
}


@pytest.mark.parametrize("drop", [False, True], ids=["history", "no_history"])
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_switches(switches, drop):
    config, model, weights = build(**switches)
    check(config, model, weights, draw(config, batch=2), drop=drop)


@pytest.mark.parametrize("add_last_motion", [0, 1])
@pytest.mark.parametrize("switches", ["released", "drop", "no_last_motion", "dense_history"])
def test_add_last_motion(switches, add_last_motion):
    config, model, weights = build(**SWITCHES[switches])
    check(config, model, weights, draw(config), add_last_motion=add_last_motion)


# Heights of which the strides of packed history are no whole numbers; 238 and 298 are among those where rounding
# errors of evenly spaced positions decide which whole number they are truncated to.
SIZES = [(1, 8, 8), (12, 8, 8), (20, 8, 10), (2, 12, 20), (1, 60, 26), (1, 26, 14), (1, 238, 8), (1, 8, 298)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_sizes(size):
    config, model, weights = build(num_layers=1, audio_inject_layers=[0])
    frames, height, width = size
    check(config, model, weights, draw(config, frames=frames, height=height, width=width))


@pytest.mark.parametrize("framepack", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("past", [0, 1, 5, 18, 23])
def test_lengths_of_history(past, framepack):
    config, model, weights = build(enable_framepack=framepack, num_layers=1, audio_inject_layers=[0])
    check(config, model, weights, draw(config, past=past))


@pytest.mark.parametrize("motion_frames", [(1, 1), (5, 2), (17, 5), (73, 19)])
def test_repeated_audio_in_front(motion_frames):
    """The official program repeats the first audio frame as often as there is history; the convolutions see five."""
    config, model, weights = build()
    check(config, model, weights, draw(config, frames=3), motion_frames=motion_frames)


def test_silence_and_text_of_any_length():
    config, model, weights = build()
    for text in (1, 6):
        check(config, model, weights, draw(config, text=text, silent=True))
