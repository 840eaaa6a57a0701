# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo-Avatar transformers from every kind of file, and from a video model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_hunyuan_avatar_model import TINY, inputs, relative, tiny

from talkingdit import models
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.initialise import initialise_from_video_model, is_video_model
from talkingdit.families.hunyuan_avatar.load import empty, load, loads, read_config
from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel
from talkingdit.families.hunyuan_avatar.save import save_official

SAID = {"rope_dim_list": (4, 6, 6)}


@pytest.fixture(scope="module")
def model():
    return tiny(dtype=torch.float32)


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_released_layout(model, tmp_path):
    ckpts = tmp_path / "ckpts"
    file = save_official(ckpts / "hunyuan-video-t2v-720p" / "transformers", model)
    assert set(torch.load(file, weights_only=True)) == {"module"}
    for source in (ckpts, file.parent, file):
        assert loads(source)
        assert same(load(source), model)
    assert read_config(ckpts)["rope_dim_list"] == (4, 6, 6)
    assert empty(ckpts).img_in.proj.weight.is_meta
    file.with_name("config.json").unlink()
    with pytest.raises(UserError, match="rope_dim_list must be said for heads of 16 channels"):
        load(ckpts)
    assert same(load(ckpts, config=SAID), model)


def test_settings_are_told_by_shapes(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    found = load(tmp_path / "a.safetensors", config=SAID)
    assert {key: found.config[key] for key in TINY} == TINY
    every = tiny(dtype=torch.float32, emotion=True, reference_channels=True, reference_projection=False)
    save_file(every.state_dict(), tmp_path / "b.safetensors")
    assert same(load(tmp_path / "b.safetensors", config=SAID), every)


def test_folders_of_diffusers_and_prefixes(model, tmp_path):
    model.save_pretrained(tmp_path / "folder" / "transformer", max_shard_size="50KB")
    assert len(list((tmp_path / "folder" / "transformer").glob("*.safetensors"))) > 1
    assert same(load(tmp_path / "folder"), model)
    state = {f"model.diffusion_model.{name}": value for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "comfy.safetensors")
    assert same(load(tmp_path / "comfy.safetensors", config=SAID), model)


def test_eight_bits_with_the_scales_beside_them(model, tmp_path):
    """The released 8-bit form: e4m3 weights of the blocks' linear layers, their scales by module in another file."""
    state, scales, want = {}, {}, {}
    for name, value in model.state_dict().items():
        state[name] = want[name] = value.bfloat16()
        if name.endswith(".weight") and value.dim() == 2 and name.startswith(("double_blocks", "single_blocks")):
            scale = value.abs().max() / 448
            state[name] = (value / scale).to(torch.float8_e4m3fn)
            scales[name.removesuffix(".weight")] = scale
            want[name] = state[name].float() * scale
    file = tmp_path / "mp_rank_00_model_states_fp8.pt"
    torch.save({"module": state}, file)
    with pytest.raises(UserError, match=r"mp_rank_00_model_states_fp8_map\.pt with their scales is not beside it"):
        load(file, config=SAID)
    torch.save(scales, tmp_path / "mp_rank_00_model_states_fp8_map.pt")
    for name, value in load(tmp_path, config=SAID).state_dict().items():
        assert torch.equal(value, want[name].float()), name
    torch.save(dict(list(scales.items())[1:]), tmp_path / "mp_rank_00_model_states_fp8_map.pt")
    with pytest.raises(UserError, match=r"the scale of .* is not in the map beside its file"):
        load(file, config=SAID)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": Evil()}, file)
    with pytest.raises(UserError, match="damaged or cut off"):
        load(file)
    assert capsys.readouterr().out == ""


def test_what_is_wrong_is_one_sentence(model, tmp_path):
    state = model.state_dict()
    save_file({k: v for k, v in state.items() if k != "before_proj.bias"}, tmp_path / "lost.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 of \d+ weights: before_proj\.bias"):
        load(tmp_path / "lost.safetensors", config=SAID)
    save_file({k: v for k, v in state.items() if not k.startswith("audio")}, tmp_path / "video.safetensors")
    with pytest.raises(UserError, match="a HunyuanVideo model without audio"):
        load(tmp_path / "video.safetensors", config=SAID)
    with pytest.raises(UserError, match="neither a folder nor a preset"):
        load(tmp_path / "nothing")


def test_presets_are_random_and_repeatable():
    first, again = (models.load("hunyuan_avatar_tiny", seed=3) for _ in range(2))
    assert isinstance(first, HunyuanAvatarModel)
    assert same(first, again)
    assert not first.audio_adapter_blocks[0].to_out.weight.any()


@pytest.fixture(scope="module")
def video_model():
    """diffusers' HunyuanVideo of the size of `tiny`, with a head of guidance that an avatar does not have."""
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HunyuanVideoTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=3, num_single_layers=2, num_refiner_layers=2,
            mlp_ratio=2.0, patch_size=2, patch_size_t=1, text_embed_dim=12, pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6), guidance_embeds=False,
        ).eval()  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                if (parameter == 1).all() or (parameter == 0).all():
                    parameter += torch.randn_like(parameter) * 0.1
    return model


def test_it_begins_from_diffusers_hunyuan_video_and_is_that(video_model, tmp_path):
    """Without a picture and voices, and with silent new layers, the avatar computes what the video model does."""
    video_model.save_pretrained(tmp_path / "video")
    given = inputs(dtype=torch.float32)
    avatar = tiny(dtype=torch.float32, freq_dim=256, reference_channels=True)
    report = initialise_from_video_model(avatar, tmp_path / "video")
    assert set(report.derived) == {"ref_in.proj.weight", "ref_in.proj.bias"}
    assert len(report.taken) + len(report.new) + len(report.derived) == len(list(avatar.parameters()))
    assert torch.equal(avatar.ref_in.proj.weight, avatar.img_in.proj.weight[:, :16])
    assert not avatar.img_in.proj.weight[:, 16:].any()
    with torch.no_grad():
        for module in (avatar.motion_exp, avatar.motion_pose, avatar.fps_proj):
            module.mlp[2].weight.zero_()
            module.mlp[2].bias.zero_()
        names = ("latents", "timestep", "text", "text_mask", "pooled_text")
        got = avatar(**{name: given[name] for name in names})
        want = video_model(
            hidden_states=given["latents"], timestep=given["timestep"], encoder_hidden_states=given["text"],
            encoder_attention_mask=given["text_mask"], pooled_projections=given["pooled_text"], return_dict=False,
        )[0]  # fmt: skip
    assert relative(got, want) < 1e-5
    assert is_video_model(tmp_path / "video")


def test_native_names_initialise_too(model, tmp_path):
    new = ("audio", "ref_in", "before_proj", "motion", "fps")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(new)}
    torch.save(
        {"module": state | {"guidance_in.mlp.0.weight": torch.zeros(2)}}, tmp_path / "mp_rank_00_model_states.pt"
    )
    avatar = tiny(1, torch.float32)
    report = initialise_from_video_model(avatar, tmp_path)
    assert report.ignored == ("guidance_in.mlp.0.weight",)
    assert all(torch.equal(avatar.state_dict()[name], value) for name, value in state.items())
    before = {name: value.clone() for name, value in avatar.state_dict().items()}
    save_file({k: v for k, v in state.items() if "single_blocks.1" not in k}, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match="does not fit a HunyuanVideo model of this size"):
        initialise_from_video_model(avatar, tmp_path / "short.safetensors")
    assert all(torch.equal(avatar.state_dict()[name], value) for name, value in before.items())
    save_file(model.state_dict(), tmp_path / "avatar.safetensors")
    with pytest.raises(UserError, match="already a HunyuanVideo-Avatar model"):
        initialise_from_video_model(avatar, tmp_path / "avatar.safetensors")
