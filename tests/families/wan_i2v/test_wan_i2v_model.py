# SPDX-License-Identifier: Apache-2.0
"""The Wan I2V transformer against that of diffusers, and against itself along every path."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from talkingdit import models
from talkingdit.errors import UserError
from talkingdit.families.wan_i2v.conditions import ExtraTokens, WanI2VInputs
from talkingdit.families.wan_i2v.initialise import initialise_from_video_model
from talkingdit.families.wan_i2v.load import load
from talkingdit.families.wan_i2v.save import save_diffusers, save_official
from talkingdit.models import preset

SMALL = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=12, text_len=6, image_dim=20)


def tiny(**changes):
    """A model with weights that all do something."""
    torch.manual_seed(0)
    model = models.load("wan_i2v_tiny", config=SMALL | changes)
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
    )
    return draw(batch, 16, frames, height, width), torch.tensor([700.0, 31.0][:batch]), WanI2VInputs(**whole | changes)


def close(a, b):
    """To rounding of float32."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.mark.parametrize("image", [20, 0])
def test_equals_diffusers(image, tmp_path):
    model = tiny(image_dim=image, text_len=512).double()
    save_diffusers(tmp_path, model)
    peer = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.float64).double().eval()
    # diffusers tells picture from text by the 512 tokens that a released model has of the latter.
    latents, timestep, inputs = given(image=draw(2, 5, 20) if image else None, text=draw(2, 512, 12))
    latents, text, condition = latents.double(), inputs.text.double(), inputs.condition.double()
    picture = None if inputs.image is None else inputs.image.double()
    ours = model(latents, timestep, WanI2VInputs(text, condition, picture))
    with torch.no_grad():
        theirs = peer(torch.cat([latents, condition], dim=1), timestep, text, picture).sample
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_float32_equals_float64(model):
    latents, timestep, inputs = given()
    exact = tiny().double()(
        latents.double(), timestep, WanI2VInputs(*(x.double() for x in (inputs.text, inputs.condition, inputs.image)))
    )
    close(model(latents, timestep, inputs), exact.float())


@pytest.mark.parametrize("save", [save_official, save_diffusers, lambda folder, model: model.save_pretrained(folder)])
def test_every_layout_comes_back(model, save, tmp_path):
    if save is save_official:  # whose program has the width of features built in
        model = tiny(image_dim=1280)
    save(tmp_path, model)
    said = json.loads((tmp_path / "config.json").read_text())
    again = models.load(tmp_path, config={"text_len": 6})
    assert {name: again.config[name] for name in SMALL} == {**SMALL, "image_dim": model.config.image_dim}
    assert said["_class_name"] in ("WanModel", "WanTransformer3DModel", "WanI2VModel")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_single_file_is_recognised_and_t2v_is_refused(model, tmp_path):
    save_diffusers(tmp_path, model)
    again = models.load(tmp_path / "diffusion_pytorch_model.safetensors", config={"num_heads": 2, "text_len": 6})
    assert type(again).__name__ == "WanI2VModel"
    with pytest.raises(UserError, match="text-to-video"):
        load(_video_model(tmp_path / "t2v", tiny(in_dim=16)), config={"num_heads": 2})


def _video_model(folder, model):
    """As a text-to-video checkpoint of diffusers."""
    save_diffusers(folder, model)
    return folder / "diffusion_pytorch_model.safetensors"


def test_begins_from_video_models(tmp_path):
    source = tiny(image_dim=0, in_dim=16)
    file = _video_model(tmp_path, source)
    model = models.load("wan_i2v_tiny", config=SMALL)
    report = initialise_from_video_model(model, file)
    assert report.widened == ("patch_embedding.weight",)
    assert not any(name.startswith("img_emb") for name in report.taken)
    latents, timestep, inputs = given()
    plain = source(latents, timestep, WanI2VInputs(inputs.text, inputs.condition[:, :0]))
    close(model(latents, timestep, inputs), plain)  # what is new has no effect yet
    with pytest.raises(UserError, match="does not fit"):
        initialise_from_video_model(models.load("wan_i2v_tiny", config=SMALL | {"ffn_dim": 32}), file)
    assert load_file(file)["patch_embedding.weight"].shape[1] == 16


def test_precomputed_and_packed_equal_one_by_one(model):
    latents, timestep, inputs = given()
    extra = ExtraTokens(draw(2, 16, 1, 4, 6), [30.0])
    inputs = WanI2VInputs(inputs.text, inputs.condition, inputs.image, (extra,))
    whole = model(latents, timestep, inputs)
    close(model(latents, timestep, model.encode_conditions(inputs)), whole)
    clips, small = [], ExtraTokens(draw(1, 16, 1, 6, 4), [41.5])
    for i in range(2):
        one = WanI2VInputs(inputs.text[i : i + 1], inputs.condition[i : i + 1], inputs.image[i : i + 1])
        clips.append(WanI2VInputs(one.text, one.condition, one.image, (small,) if i else (_sample(extra, 0),)))
    sizes = [latents[0], latents[1][:, :2]]
    clips[1] = WanI2VInputs(clips[1].text, clips[1].condition[:, :, :2], clips[1].image, clips[1].extra)
    packed = model.denoise_packed(sizes, [timestep[0], torch.tensor([0.0, 31.0])], clips)
    close(packed[0], whole[0])
    close(packed[1], model(sizes[1][None], torch.tensor([[0.0, 31.0]]), clips[1])[0])


def test_compiles_to_one_graph(model):
    latents, timestep, inputs = given()
    inputs = WanI2VInputs(inputs.text, inputs.condition, inputs.image, (ExtraTokens(draw(2, 16, 1, 4, 6), [30.0]),))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(latents, timestep, inputs), model(latents, timestep, inputs))


def _sample(extra, i):
    return ExtraTokens(extra.latents[i : i + 1], extra.times)


def test_extra_tokens_are_a_frame_of_the_video_where_they_stand(model):
    """At a place behind the clip and of its size, clean at timestep 0: one more frame that is given."""
    latents, timestep, inputs = given(batch=1)
    clean = draw(1, 16, 1, 8, 12, seed=5)
    with_extra = WanI2VInputs(inputs.text, inputs.condition, inputs.image, (ExtraTokens(clean, [3.0]),))
    known = torch.cat([inputs.condition, model.known(clean)[:, 16:]], dim=2)
    longer = torch.cat([latents, clean], dim=2)
    steps = torch.tensor([[700.0, 700.0, 700.0, 0.0]])
    expected = model(longer, steps, WanI2VInputs(inputs.text, known, inputs.image))[:, :, :3]
    close(model(latents, timestep, with_extra), expected)
    moved = WanI2VInputs(inputs.text, inputs.condition, inputs.image, (ExtraTokens(clean, [9.5]),))
    assert not torch.allclose(model(latents, timestep, moved), expected, atol=1e-3)


def test_a_dropped_extra_is_none(model):
    latents, timestep, inputs = given()
    extra = ExtraTokens(draw(2, 16, 1, 4, 6), [30.0], drop=[True, False])
    some = model(latents, timestep, WanI2VInputs(inputs.text, inputs.condition, inputs.image, (extra,)))
    none = model(latents, timestep, inputs)
    every = ExtraTokens(extra.latents, extra.times)
    all_ = model(latents, timestep, WanI2VInputs(inputs.text, inputs.condition, inputs.image, (every,)))
    close(some[0], none[0])
    close(some[1], all_[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": draw(2, 5, 7)}, r"image must have shape \[2, L, 20\], got \[2, 5, 7\]"),
        ({"condition": draw(2, 20, 4, 8, 12)}, r"condition must have shape \[2, 20, 3, 8, 12\]"),
        ({"extra": (ExtraTokens(draw(2, 16, 1, 3, 4), [1]),)}, r"extra\[0\].latents must have even height"),
        ({"extra": (ExtraTokens(draw(2, 16, 2, 4, 4), [1]),)}, r"extra\[0\].latents must have shape \[2, 16, 1"),
        ({"audio": draw(2, 3)}, "takes no audio"),
    ],
)
def test_says_what_does_not_fit(model, changes, message):
    latents, timestep, inputs = given(**changes)
    with pytest.raises(ValueError, match=f"WanI2VModel: {message}"):
        model(latents, timestep, inputs)


@pytest.mark.parametrize(("name", "image"), [("wan_i2v_14b_480p", 1280), ("wan22_i2v_14b", None)])
def test_presets_are_the_released_sizes(name, image):
    ours = models.load(name, device="meta")
    width = None if image is None else 5120
    with torch.device("meta"):  # of diffusers, whose defaults are those of Wan 14B
        peer = WanTransformer3DModel(in_channels=36, image_dim=image, added_kv_proj_dim=width)
    assert ours.num_parameters() == peer.num_parameters()
    assert preset("wan_i2v_14b_480p") == preset("wan_i2v_14b_720p")
