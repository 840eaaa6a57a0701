# SPDX-License-Identifier: Apache-2.0
"""Predictions against a count of all live tensors while the real model runs on tensors without storage."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2Config, Wav2Vec2Model

from bench.live_memory import LiveMemory
from talkingdit import families
from talkingdit.autoencoders.codec import WAN_PART, WanCodec
from talkingdit.autoencoders.streaming import StreamingDecoder, encode
from talkingdit.cli import main as cli
from talkingdit.errors import UserError
from talkingdit.families.puppet import cost as puppet_cost
from talkingdit.families.wan_s2v import cost as wan_cost
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.rope import layout_at
from talkingdit.families.wan_s2v.units import UNITS
from talkingdit.models import WanS2VModel, default_checkpoint, preset
from talkingdit.nn.eight_bit import quantise
from talkingdit.ops import _eight_bit_library
from talkingdit.pipelines.memory import Memory
from talkingdit.plan import generation as planner
from talkingdit.plan import shipped
from talkingdit.plan.cards import EFFICIENCY, GIB, HOST_TO_DEVICE, card_of
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.cost import ALL_SWITCHES, AUTOENCODER, Cost
from talkingdit.plan.transformer import Transformer


@pytest.fixture(autouse=True)
def _no_fake_tables():
    """Tables of rotations are kept between calls; those made of fake tensors must not be."""
    layout_at.cache_clear()
    yield
    layout_at.cache_clear()


def fake_model(config, dtype):
    """To be called in a fake mode: a model with weights of `dtype` and those that stay float32."""
    torch.set_default_dtype(dtype)
    try:
        model = WanS2VModel(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if any(word in f"{name}.{key}" for word in WanS2VModel._keep_in_fp32_modules):
                setattr(module, key, torch.nn.Parameter(torch.empty(parameter.shape), requires_grad=False))
    return model


def clip_of(height=448, width=832, latents=20, history=19, steps=40, branches=2, **more):
    """A clip of the released model, but for what is said."""
    return ClipShape(height, width, latents, history, steps, branches, **more)


def wan(config):
    return Transformer.of(families.get("wan_s2v"), config)


def measured(config, clip, memory, dtype):
    """Bytes of weights, kept conditions, and the peak of two steps, of all branches."""
    config = dict(config, residual_dtype=memory.residual, audio_absorb="value" if memory.absorb_audio else "none")
    height, width, b = clip.height // 8, clip.width // 8, clip.batch
    size = (clip.latents, height, width)
    with FakeTensorMode(), torch.no_grad():
        model = fake_model(config, dtype)
        if memory.precision != "native":
            quantise(model, UNITS, memory.precision)
        weights = [*model.parameters(), *model.buffers()]
        with LiveMemory(weights) as count:
            base = count.live
            conditions = [
                model.encode_conditions(
                    WanInputs(
                        torch.empty(b, config["text_len"], config["text_dim"]),
                        reference=torch.empty(b, config["in_dim"], 1, height, width),
                        history=torch.empty(b, config["in_dim"], clip.history, height, width) if clip.history else None,
                        pose=torch.empty(b, config["cond_dim"], *size) if clip.pose else None,
                        audio=torch.empty(b, config["audio_layers"], config["audio_dim"], 4 * clip.latents),
                        size=size,
                    )
                )
                for _ in range(1 if clip.batched else clip.branches)
            ]
            kept = count.live - base
            count.reset()
            x, t = torch.empty(b, config["in_dim"], *size), torch.empty(b)
            solver = torch.empty(6, *x.shape[1:])  # what a solver of second order keeps
            for condition in conditions:
                model(x, t, conditions=condition)
        assert len(solver) == 6
    return base, kept, count.peak


SMALL = preset(
    "wan_s2v_14b",
    **dict(dim=1024, ffn_dim=4096, num_heads=8, num_layers=3, audio_inject_layers=(0, 2), text_dim=512, audio_dim=64),
)
CASES = {
    "14B of 4 blocks, 448x832": (
        preset("wan_s2v_14b", num_layers=4, audio_inject_layers=(0, 2)),
        clip_of(),
        Memory(),
        torch.bfloat16,
    ),
    "14B of 2 blocks, 704x1024, first clip": (
        preset("wan_s2v_14b", num_layers=2, audio_inject_layers=(0,)),
        clip_of(704, 1024, history=0, pose=True),
        Memory(residual="compute"),
        torch.bfloat16,
    ),
    "14B of 2 blocks, guided at once, absorbed": (
        preset("wan_s2v_14b", num_layers=2, audio_inject_layers=(0, 1)),
        clip_of(480, 832, latents=12, batched=True),
        Memory(absorb_audio=True),
        torch.bfloat16,
    ),
    "14B of 3 blocks, layers in eight bits": (
        preset("wan_s2v_14b", num_layers=3, audio_inject_layers=(0, 2)),
        clip_of(),
        Memory(precision="fp8"),
        torch.bfloat16,
    ),
    "1024 wide, float32": (SMALL, clip_of(256, 256), Memory(), torch.float32),
    "1024 wide, history as it is": (
        dict(SMALL, enable_framepack=False, enable_adain=False),
        clip_of(256, 384, latents=8, branches=1),
        Memory(),
        torch.bfloat16,
    ),
    "the drawn characters": (preset("puppet_tiny"), clip_of(96, 96, 8), Memory(), torch.float32),
}


@pytest.mark.slow
def test_memory_of_the_whole_released_model_is_predicted():
    test_memory_of_denoising_is_predicted((preset("wan_s2v_14b"), clip_of(), Memory(), torch.bfloat16))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_memory_of_denoising_is_predicted(case):
    config, clip, memory, dtype = case
    weights, kept, peak = measured(config, clip, memory, dtype)
    transformer = wan(config)
    plan = planner.predict(transformer, planner.weigh(transformer, dtype), clip, memory)
    assert plan.weights["transformer"] == weights
    assert plan.conditions == pytest.approx(kept, rel=0.1)
    # Not only the whole, which weights dominate, but what comes on top of them.
    assert plan.phases["denoise"] == pytest.approx(peak - weights, rel=0.1)
    assert plan.weights["transformer"] + plan.phases["denoise"] == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_autoencoder_is_predicted(dtype):
    clip = clip_of(256, 320, latents=4, history=5)
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(dtype)
        vae = AutoencoderKLWan().eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        weights = list(vae.parameters())
        assert sum(p.numel() for p in weights) == wan_cost.VAE_PARAMETERS
        with LiveMemory(weights) as count:
            base = count.live
            decoder = StreamingDecoder(vae)
            frames = [decoder(torch.empty(1, 16, 1, 32, 40)) for _ in range(4)]
            decode = count.peak - base
            del decoder
            count.reset()
            encode(vae, torch.empty(1, 3, 17, 256, 320))
            encoding = count.peak - base
            assert len(frames) == 4
    phases = wan_cost.autoencoder(wan_cost.complete({}), clip, Memory(), dtype.itemsize)
    assert phases["decode"] == pytest.approx(decode, rel=0.1)
    assert phases["encode"] == pytest.approx(encoding, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [clip_of(96, 96, 8), clip_of(192, 128, 3), clip_of(96, 96, 16)], ids=str)
def test_memory_of_the_tiny_autoencoder_is_predicted(clip, dtype):
    """As the pipeline uses it: the portrait is encoded, and decoded for the caches before the clip."""
    config = json.loads((default_checkpoint() / "vae" / "config.json").read_text())
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(dtype)
        vae = AutoencoderKLWan(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
        torch.set_default_dtype(torch.float32)
        weights = list(vae.parameters())
        assert sum(p.numel() for p in weights) == shipped.VAE_PARAMETERS
        with LiveMemory(weights) as count:
            base = count.live
            portrait = encode(vae, torch.empty(1, 3, 1, clip.height, clip.width))
            encoding = count.peak - base
            decoder = StreamingDecoder(vae)
            decoder(portrait)
            count.reset()
            frames = decoder(torch.empty(1, 16, clip.latents, clip.height // 8, clip.width // 8))
            assert frames.shape[2] == clip.frames
            decode = count.peak - base
    phases = puppet_cost.autoencoder(preset("puppet_tiny"), clip, Memory(), dtype.itemsize)
    assert phases["decode"] == pytest.approx(decode, rel=0.1)
    assert phases["encode"] == pytest.approx(encoding, rel=0.1)


@pytest.mark.parametrize("clip", [clip_of(96, 96, 8), clip_of(128, 128, 33)], ids=str)
def test_memory_of_whole_clips_in_the_tiny_autoencoder_is_predicted(clip):
    """As families use it that encode clips and decode them in parts; it is float32 there."""
    config = json.loads((default_checkpoint() / "vae" / "config.json").read_text())
    with FakeTensorMode(), torch.no_grad():
        vae = AutoencoderKLWan(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
        with LiveMemory(list(vae.parameters())) as count:
            base = count.live
            encode(vae, torch.empty(1, 3, clip.frames - 3, clip.height, clip.width))
            encoding = count.peak - base
            latents = torch.empty(1, 16, clip.latents, clip.height // 8, clip.width // 8)
            base = count.live
            count.reset()
            for part in range(len(WanCodec(vae).parts(clip.latents))):
                WanCodec(vae).decode(latents, part, None)
            decode = count.peak - base
    phases = shipped.autoencoder(replace(clip, latents=min(clip.latents, WAN_PART)), 4, video=True)
    assert phases["decode"] == pytest.approx(decode, rel=0.1)
    whole = shipped.autoencoder(clip, 4, video=True)
    assert whole["encode"] == pytest.approx(encoding, rel=0.1)
    assert whole["decode"] >= 0.95 * decode


@pytest.mark.parametrize("seconds", [5, 60])
def test_memory_of_the_speech_encoder_is_predicted(seconds):
    """Of the released size; all of its layers are kept."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    config = Wav2Vec2Config(**sizes, conv_bias=True, feat_extract_norm="layer", do_stable_layer_norm=True)
    with FakeTensorMode(), torch.no_grad():
        model = Wav2Vec2Model(config).eval().requires_grad_(False)
        weights = list(model.parameters())
        assert sum(p.numel() for p in weights) == wan_cost.SPEECH_PARAMETERS
        with LiveMemory(weights) as count:
            base = count.live
            model(torch.empty(1, 16000 * seconds), output_hidden_states=True)
            hearing = count.peak - base
    cost = wan_cost.speech(wan_cost.complete({}))
    assert cost.hearing * seconds == pytest.approx(hearing, rel=0.1)
    assert cost.features == 25 * 1024 * 4 * 16


def test_the_command_plans_for_a_voice(tmp_path, capsys):
    def said(*words):
        assert cli.main(["plan", "--preset", "wan_s2v_14b", "--card", "h100", *words]) == 0
        return capsys.readouterr().out

    hour = said("--seconds", "3600")
    assert "3600.0 s, heard in 36 windows of 120 s: 720 clips" in hour
    assert "5.90 GB on the disk of the output" in hour
    assert "h for the 720 clips of the voice" in hour
    phases = {name: float(hour.split(name)[1].split("GB")[0]) for name in ("speech  ", "features")}
    assert phases["speech  "] == pytest.approx(1.58, abs=0.01)
    assert "heard whole: 12 clips" in said("--seconds", "60")
    soundfile.write(tmp_path / "voice.wav", 0.1 * np.random.default_rng(0).normal(size=24000), 8000)
    assert "3.0 s, heard whole: 1 clip\n" in said("--audio", str(tmp_path / "voice.wav"))
    assert "voice  " not in said()
    assert cli.main(["plan", "--preset", "puppet_tiny", "--seconds", "3600"]) == 0
    assert "speech  " not in capsys.readouterr().out  # no model hears it, and none on the card


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_model_takes_what_its_preset_says(dtype):
    folder, cost = default_checkpoint(), families.get("puppet").cost
    read, named = (cost.complete(config) for config in (cost.read_config(folder), preset("puppet_tiny")))
    assert cost.parameters(read) == cost.parameters(named)
    assert cost.frozen_parts(read, dtype, folder) == cost.frozen_parts(named, dtype)
    assert cost.default_clip(read, folder) == cost.default_clip(named)
    assert cost.default_clip(named) == clip_of(96, 96, 8, steps=8, batched=True)


@pytest.mark.parametrize("name", families.names())
def test_every_family_has_its_costs(name):
    wanted = [key for key in (*Cost.__annotations__, *vars(Cost)) if not key.startswith("_")]
    assert len(wanted) > 12
    assert not [key for key in wanted if not hasattr(families.get(name).cost, key)]


@pytest.mark.parametrize("absorb", [False, True])
def test_operations_are_counted(absorb):
    clip = clip_of(256, 256, latents=6, branches=1)
    memory = Memory(absorb_audio=absorb)
    # The counter knows attention by its products only.
    config = dict(SMALL, audio_absorb="value" if absorb else "none", attention_backend="math")
    with FakeTensorMode(), torch.no_grad():
        model = WanS2VModel(**config).eval()
        conditions = model.encode_conditions(
            WanInputs(
                torch.empty(1, 512, 512),
                reference=torch.empty(1, 16, 1, 32, 32),
                history=torch.empty(1, 16, 19, 32, 32),
                size=(6, 32, 32),
            )
        )
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 16, 6, 32, 32), torch.empty(1), conditions=conditions)
    # Our audio attention is not known to the counter, nor is it much: 5 keys per query.
    assert wan(config).flops(clip, memory) == pytest.approx(counter.get_total_flops(), rel=0.02)


@functools.cache
def released_parts():
    transformer = wan(preset("wan_s2v_14b"))
    return transformer, planner.weigh(transformer, torch.bfloat16)


def released(clip=None, memory=None, tflops=None):
    return planner.predict(*released_parts(), clip or clip_of(), memory, tflops=tflops)


def test_advice_fits_and_changes_no_more_than_it_must():
    def again(memory, clip):
        return released(clip, memory)

    plan = released(clip_of(batched=True))
    previous = 0
    for card in (24, 32, 40, 48, 80):
        found = planner.advice(plan, again, card * GIB, ALL_SWITCHES)
        if found is None:
            assert card == 24
            continue
        assert found.needed <= card * GIB
        switches = len(str(found.memory).split(","))
        assert previous == 0 or switches <= previous
        previous = switches
    assert str(planner.advice(plan, again, 80 * GIB, ALL_SWITCHES).memory) == ""
    assert planner.advice(plan, again, GIB, ALL_SWITCHES) is None


def test_time_is_work_by_speed_or_the_way_of_the_weights():
    plan = released(tflops=100)
    assert plan.seconds_per_clip == pytest.approx(40 * plan.flops_per_step / (100e12 * EFFICIENCY))
    offloaded = released(tflops=1e9, memory=Memory(offload="block"))
    assert offloaded.seconds_per_clip == pytest.approx(40 * 2 * released().weights["transformer"] / HOST_TO_DEVICE)
    assert released().seconds_per_clip is None


def test_steps_outside_the_interval_of_guidance_take_one_prediction():
    every, some = released(tflops=100), released(clip_of(guided=10), tflops=100)
    assert some.seconds_per_clip == pytest.approx((10 * 2 + 30) / (40 * 2) * every.seconds_per_clip)
    assert (some.peak, some.flops_per_step) == (every.peak, every.flops_per_step)
    kept, moved = released(tflops=1e9, memory=Memory(offload="block")), Memory(offload="block")
    offloaded = released(clip_of(guided=10), tflops=1e9, memory=moved)
    assert offloaded.seconds_per_clip == pytest.approx((10 * 2 + 30) / (40 * 2) * kept.seconds_per_clip)


def test_the_command_plans_for_an_interval_of_guidance(capsys):
    plan = ["plan", "--preset", "wan_s2v_14b", "--card", "h100", "--steps", "10"]
    assert cli.main([*plan, "--guidance-interval", "0.2-0.8"]) == 0
    assert "10 steps, 2 predictions per step in one pass in 6 of them, else 1" in capsys.readouterr().out


def test_cards():
    assert card_of("24GB") == card_of("24") == (24 * 2**30, None)
    assert card_of("RTX4090") == (24 * 2**30, 165)
    with pytest.raises(UserError, match=r"must be a size like 24GB or one of rtx3090, .*, got 'big'"):
        card_of("big")


def test_layers_in_eight_bits_take_less_and_are_faster():
    """Sums of int8 products lie within an op, where nothing counts them: a bound that the op keeps."""
    plain, fp8, int8 = (released(tflops=100, memory=Memory(precision=name)) for name in ("native", "fp8", "int8"))
    assert fp8.peak < plain.peak
    assert fp8.weights["transformer"] == int8.weights["transformer"] < 0.6 * plain.weights["transformer"]
    assert int8.phases["denoise"] - fp8.phases["denoise"] == wan_cost.INT8_SUMS == _eight_bit_library.SUMS
    work = plain.flops_per_step
    attention = 2 * wan_cost.attention_flops(wan(preset("wan_s2v_14b")).config, clip_of())
    assert fp8.seconds_per_clip / plain.seconds_per_clip == pytest.approx((attention + (work - attention) / 2) / work)


def test_the_command_plans_for_a_precision(capsys):
    assert cli.main(["plan", "--preset", "wan_s2v_14b", "--card", "h100", "--precision", "int8"]) == 0
    assert "switches    precision=int8" in capsys.readouterr().out


def test_switches_take_less():
    plain = released()
    for memory in (
        Memory(weights="cast_fp8"),
        Memory(weights="int8"),
        Memory(offload="block"),
        Memory(offload="leaf"),
        Memory(text_encoder="cpu"),
    ):
        assert released(memory=memory).peak < plain.peak
    assert released(memory=Memory(residual="compute")).phases["denoise"] < plain.phases["denoise"]
    tiled = released(memory=Memory(vae="tiled"))
    assert tiled.phases["decode"] < plain.phases["decode"]
    assert released(clip_of(batched=True)).phases["denoise"] > plain.phases["denoise"]


def test_the_command_says_what_a_card_needs(capsys):
    assert cli.main(["plan", "--preset", "wan_s2v_14b", "--size", "832x448", "--card", "rtx4090"]) == 0
    said = capsys.readouterr().out
    assert "832 x 448, 80 frames, 40 steps, 2 predictions per step" in said
    assert "does not fit; with --memory offload=block,text_encoder=cpu --sequential it needs" in said
    assert "an estimate from 165 TFLOP/s at 50%, not measured" in said
    switches = said.split("--memory ")[1].split()[0]
    assert cli.main(["plan", "--preset", "wan_s2v_14b", "--card", "24GB", "--sequential", "--memory", switches]) == 0
    said = capsys.readouterr().out
    assert said.endswith("fits\n")
    assert "time        unknown" in said


# Gigabytes of weights beside the transformer in bfloat16: text encoder, autoencoder, picture and speech encoder.
RELEASED = {
    "gloria_17b": (11.36, 0.51, 2.53, 1.26),
    "gloria_5b": (11.36, 0.51, 2.53, 1.26),
    "hunyuan_avatar_13b": (16.96, 0.99, 0.0, 0.03),
    "skyreels_audio": (11.36, 0.51, 2.53, 2.55),
    "skyreels_audio_1_3b": (11.36, 0.51, 2.53, 2.55),
    "wan22_i2v_14b": (11.36, 0.51, 0.0, 0.0),
    "wan_i2v_14b_480p": (11.36, 0.51, 2.53, 0.0),
    "wan_i2v_14b_720p": (11.36, 0.51, 2.53, 0.0),
    "wan_s2v_14b": (11.36, 0.51, 0.0, 1.26),
}


@pytest.mark.parametrize("name", [name for family in families.names() for name in families.get(family).presets])
def test_presets_are_planned_with_the_parts_that_belong_to_them(name):
    family = families.of_preset(name)
    transformer = Transformer.of(family, family.presets[name])
    weights = planner.weigh(transformer, torch.bfloat16)
    clip = family.cost.default_clip(transformer.config)
    found = planner.predict(transformer, weights, clip, voice=planner.hear(transformer, clip, 10))
    small = name.endswith(("_tiny", "_drawn"))
    assert small is (name not in RELEASED)
    assert (found.peak < 1e9) is small
    if small:
        assert set(found.weights) == {"transformer", "text encoder", "autoencoder"}
        assert sum(found.weights.values()) < 50e6
        assert "speech" not in found.phases
    else:
        parts = ("text encoder", "autoencoder", "picture encoder", "speech encoder")
        assert [found.weights.get(part, 0) / 1e9 for part in parts] == pytest.approx(RELEASED[name], abs=0.006)


@pytest.mark.parametrize("source", [["--preset", "puppet_tiny"], ["--checkpoint", str(default_checkpoint())]])
def test_drawn_characters_take_megabytes(source, capsys):
    assert cli.main(["plan", *source, "--card", "h100"]) == 0
    said = capsys.readouterr().out
    assert "96 x 96, 32 frames, 8 steps, 2 predictions per step in one pass" in said
    assert "speech encoder" not in said
    sizes = {name: said.split(name)[1].split("\n")[0].split() for name in ("transformer", "text encoder", "peak")}
    assert all(unit == "MB" for _, unit in sizes.values())
    assert float(sizes["peak"][0]) < 50
    assert "GFLOP per step" in said
    assert said.endswith("fits\n")
    assert cli.main(["plan", *source, "--card", "0.5GB"]) == 0
    assert "does not fit, with any switch" in capsys.readouterr().out


def test_a_checkpoint_folder_is_read_and_not_loaded(tmp_path, capsys):
    config = dict(_class_name="WanModel_S2V", dim=64, ffn_dim=96, num_heads=2, num_layers=2, audio_inject_layers=[0])
    (tmp_path / "config.json").write_text(json.dumps(config | dict(motion_frames=73, text_dim=24)))
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"0" * 3_000_000)
    assert cli.main(["plan", "--checkpoint", str(tmp_path), "--size", "128x128"]) == 0
    assert "autoencoder         3.00 MB" in capsys.readouterr().out
    assert (
        wan_cost.frozen_parts(wan_cost.read_config(tmp_path), torch.bfloat16, tmp_path).sizes[AUTOENCODER] == 3_000_000
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "wan"], "wan: neither a folder nor a preset"),
        (["--preset", "wan_s2v_14b", "--card", "big"], "--card must be a size like 24GB or one of"),
        (["--preset", "wan_s2v_14b", "--size", "100x100"], "sides must be multiples of 16 pixels, got 100 x 100"),
        (["--preset", "wan_s2v_14b", "--frames", "81"], "multiple of 4 frames, got 81"),
        (["--preset", "wan_s2v_14b", "--memory", "weights=fp4"], "weights must be one of native"),
        (["--preset", "wan_s2v_14b", "--seconds", "-5"], "seconds must be"),
        (["--preset", "wan_s2v_14b", "--seconds", "1e12"], "seconds must be 0.1 to 10000000"),
        (["--preset", "wan_s2v_14b", "--audio", "nowhere.wav"], "audio 'nowhere.wav': expected an existing file"),
        (["--preset", "wan_s2v_14b", "--audio", "a.wav", "--seconds", "5"], "where --audio is given"),
        (
            ["--preset", "wan_s2v_14b", "--guidance-interval", "0.8"],
            "--guidance-interval must be BEGIN-END, shares of",
        ),
        (["--preset", "wan_s2v_14b", "--plain", "--guidance-interval", "0-0.5"], "where --plain leaves guidance out"),
        (["--preset", "puppet_tiny", "--pose"], "this model takes no pose video"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, capsys):
    assert cli.main(["plan", *arguments]) == cli.USER_ERROR
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "has"), [("wan_i2v_14b_480p", True), ("wan22_i2v_14b", False)])
def test_a_model_without_a_picture_encoder_is_planned_without(preset, has, capsys):
    assert cli.main(["plan", "--preset", preset]) == 0
    assert ("picture encoder" in capsys.readouterr().out) is has


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[]", "must hold a JSON object"),
        ('{"_class_name": "SkyReelsAudioModel", "num_layers": 1e9}', "num_layers must be a whole number"),
        ('{"_class_name": "WanI2VModel", "num_heads": 0}', "num_heads must be a whole number of at least 1, got '0'"),
        ('{"_class_name": "WanModel", "in_dim": 36, "model_type": "i2v", "dim": null}', "dim must be a whole number"),
    ],
)
def test_a_configuration_that_is_none_is_one_sentence(config, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    assert cli.main(["plan", "--checkpoint", str(tmp_path)]) == cli.USER_ERROR
    assert said in capsys.readouterr().err
