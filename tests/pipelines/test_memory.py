# SPDX-License-Identifier: Apache-2.0
"""Every switch that saves memory, on tiny models: the same video, or one within a stated distance."""

import dataclasses

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from talkingdit.errors import UserError
from talkingdit.families.wan_s2v import units
from talkingdit.models import WanS2VModel, preset
from talkingdit.nn.units import modules_of
from talkingdit.pipelines.memory import Memory, fit


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def tiny(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    small = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=3, freq_dim=16, text_dim=12, text_len=6, audio_dim=8)
    small |= dict(audio_inject_layers=(0, 2), cond_dim=16, zip_frame_buckets=(1, 2, 4), motion_frames=(25, 7))
    model = WanS2VModel(**preset("puppet_tiny", **(small | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.15)
    kept = WanS2VModel._keep_in_fp32_modules
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if not any(word in f"{name}.{key}" for word in kept):
                parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def inputs(pose=True):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return dict(
        text=draw(2, 5, 12),
        reference=draw(2, 16, 1, 8, 8),
        history=draw(2, 16, 7, 8, 8),
        pose=draw(2, 16, 2, 8, 8) if pose else None,
        audio=draw(2, 2, 8, 8),
    )


LATENTS = torch.randn(2, 16, 2, 8, 8, generator=torch.Generator().manual_seed(2))
TIMESTEP = torch.tensor([300.0, 700.0])


@torch.no_grad()
def both_ways(model, pose=True, before=lambda: None):
    """The velocity by a direct call, and with conditions made beforehand, twice as in two denoising steps."""
    given = inputs(pose)
    before()
    velocities = [model(LATENTS, TIMESTEP, **given)]
    before()
    conditions = model.encode_conditions(**given, size=(2, 8, 8))
    for _ in range(2):
        before()
        velocities.append(model(LATENTS, TIMESTEP, conditions=conditions))
    return velocities


@pytest.mark.parametrize("pose", [True, False])
@pytest.mark.parametrize("absorb", ["none", "value"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_every_weight_is_fetched_before_it_is_used(level, absorb, pose, tmp_path):
    """Weights that wait on disk are empty until a hook brings them; one that is used past its hook would show."""
    want = both_ways(tiny(audio_absorb=absorb), pose)[0]
    model = tiny(audio_absorb=absorb)
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_type=level,
        num_blocks_per_group=1 if level == "block_level" else None,
        offload_to_disk_path=str(tmp_path),
    )

    def forget():
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))

    for out in both_ways(model, pose, before=forget):
        assert relative(out, want) < 1e-6


@pytest.mark.parametrize("offload", ["block", "leaf"])
def test_offloading_changes_nothing(offload):
    model = tiny()
    want = both_ways(model)[0]
    fit(model, Memory(offload=offload), "cpu", units)
    hooked = model.blocks[0] if offload == "block" else model.blocks[0].ffn[0]
    assert hooked._diffusers_hook.get_hook("group_offloading") is not None
    for out in both_ways(model):
        assert relative(out, want) < 1e-6


def test_casting_to_fp8_leaves_precise_layers_alone_and_computes_in_the_weights_dtype():
    want = both_ways(tiny(torch.bfloat16))[0]
    model = tiny(torch.bfloat16)
    fit(model, Memory(weights="cast_fp8"), "cpu", units)
    kept = {name: p.dtype for name, p in model.named_parameters()}
    assert kept["blocks.1.ffn.0.weight"] == kept["audio_injector.injector.0.q.weight"] == torch.float8_e4m3fn
    assert kept["text_embedding.0.weight"] == torch.float8_e4m3fn
    for name in ("time_embedding.0.weight", "time_projection.1.weight", "blocks.1.modulation", "head.modulation"):
        assert kept[name] == torch.float32, name
    for name, dtype in kept.items():
        precise = ("norm", "head.", "patch_embedding", "casual_audio", "cond", "frame_packer")
        if any(word in name for word in precise) and "modulation" not in name:
            assert dtype == torch.bfloat16, name
    seen = []
    model.blocks[1].ffn[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    for out in both_ways(model):
        assert out.dtype == torch.float32
        assert relative(out, want) < 0.1
    assert set(seen) == {torch.bfloat16}


def test_casting_and_offloading_together():
    model = tiny(torch.bfloat16)
    fit(model, Memory(weights="cast_fp8"), "cpu", units)
    want = both_ways(model)[0]
    model = tiny(torch.bfloat16)
    fit(model, Memory(weights="cast_fp8", offload="leaf"), "cpu", units)
    for out in both_ways(model):
        assert relative(out, want) < 1e-2


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_weights(kind):
    pytest.importorskip("torchao", reason="torchao is an optional extra")
    want = both_ways(tiny(torch.bfloat16))[0]
    model = tiny(torch.bfloat16)
    fit(model, Memory(weights=kind, absorb_audio=True), "cpu", units)
    assert type(model.blocks[0].ffn[0].weight.data) is not torch.Tensor
    assert type(model.head.head.weight.data) is torch.Tensor
    for out in both_ways(model):
        assert relative(out, want) < 0.1


def test_quantisation_without_torchao_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="weights=int8 needs torchao, which is not installed"):
        fit(tiny(), Memory(weights="int8"), "cpu", units)


def test_a_narrow_residual_stream_and_absorbed_audio_stay_near():
    want = both_ways(tiny(torch.bfloat16))[0]
    model = tiny(torch.bfloat16)
    fit(model, Memory(residual="compute", absorb_audio=True), "cpu", units)
    assert (model.config.residual_dtype, model.config.audio_absorb) == ("compute", "value")
    for out in both_ways(model):
        assert 0 < relative(out, want) < 5e-2


def test_a_whole_checkpoint():
    @dataclasses.dataclass
    class PuppetCheckpoint:
        transformer: WanS2VModel
        vae: AutoencoderKLWan
        text_encoder: torch.nn.Module

    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    checkpoint = PuppetCheckpoint(tiny(), vae, torch.nn.Linear(2, 2))
    fit(checkpoint, Memory(vae="tiled", text_encoder="cpu"), "cpu", units)
    assert vae.use_tiling
    fit(checkpoint, Memory(offload="block"), "cpu", units)
    with pytest.raises(ValueError, match="must be as it was loaded, got one with hooks"):
        fit(checkpoint, Memory(), "cpu", units)


@torch.no_grad()
def test_the_example_of_a_family_goes_through_every_unit():
    model, seen = tiny(), []
    for path, module, _ in modules_of(model, units.UNITS):
        module.register_forward_pre_hook(lambda module, given, path=path: seen.append(path))
    model(**units.example_inputs(model.config, "cpu"))
    assert set(seen) == {path for path, _, _ in modules_of(model, units.UNITS)}


def test_words_of_switches():
    memory = Memory.parse("weights=cast_fp8, text_encoder=cpu,absorb_audio")
    assert memory == Memory(weights="cast_fp8", text_encoder="cpu", absorb_audio=True)
    assert Memory.parse(str(memory)) == memory
    assert str(Memory()) == ""
    with pytest.raises(ValueError, match="weights must be one of native, cast_fp8, fp8, int8, got 'fp4'"):
        Memory.parse("weights=fp4")
    with pytest.raises(ValueError, match=r"switches are weights, .*, got 'speed'"):
        Memory.parse("speed=1")
