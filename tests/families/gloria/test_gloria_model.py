# SPDX-License-Identifier: Apache-2.0
"""The transformer of Gloria: anchors where they are said to stand, audio in windows, silent at first."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel

from talkingdit import models
from talkingdit.families.gloria.anchors import KINDS, OFFSETS, STEP, anchor_time, read_anchor
from talkingdit.families.gloria.audio import WINDOW
from talkingdit.families.wan_i2v.conditions import ExtraTokens, WanI2VInputs, clip_layout
from talkingdit.families.wan_i2v.initialise import initialise_from_video_model
from talkingdit.families.wan_i2v.save import save_diffusers
from talkingdit.ops import RopeLayout, Segment

CPU = torch.device("cpu")
SMALL = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=3, freq_dim=16, text_dim=12, text_len=6, image_dim=20)
SMALL |= dict(audio_inject_layers=(0, 2), audio_dim=8, audio_layers=3, audio_width=10)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = models.load("gloria_tiny", config=SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2)
    return model.requires_grad_(False)


def inputs(model, batch=1, frames=3, extra=(), **changes):
    whole = dict(text=draw(batch, 6, 12), condition=draw(batch, 20, frames, 8, 12), image=draw(batch, 5, 20))
    whole["audio"] = draw(batch, 3, 8, WINDOW * frames)
    return draw(batch, 16, frames, 8, 12), torch.full((batch,), 700.0), WanI2VInputs(**whole | changes, extra=extra)


def anchor(model, type, kind, height=4, width=6, seed=5):
    return ExtraTokens(draw(1, 16, 1, height, width, seed=seed), [model.anchor_time(type, kind)])


def test_every_anchor_has_a_place_of_its_own_behind_a_chunk():
    times = [anchor_time(OFFSETS, STEP, type, kind) for type, kinds in KINDS.items() for kind in kinds]
    assert len(set(times)) == 13
    assert min(times) > 20
    gaps = {a: [t for t in times if OFFSETS[a] <= t < OFFSETS[a] + 10] for a in KINDS}
    assert [len(found) for found in gaps.values()] == [1, 4, 8]


def test_places_are_settings():
    assert anchor_time({"global": 1, "view": -7.5, "expression": 0}, 0.5, "viewpoint", "left") == -6.5
    layout = clip_layout((3, 4, 6), [((41.0,), 2, 3)], 24)
    segments = [Segment(range(3), range(4), range(6)), Segment([41.0], range(2), range(3))]
    plain = RopeLayout(segments, split=(8, 8, 8))
    for ours, wanted in zip(layout.tables(CPU, torch.float64), plain.tables(CPU, torch.float64), strict=True):
        assert torch.equal(ours, wanted)
    with pytest.raises(ValueError, match="kind of view must be one of front, back, left, right, got 'top'"):
        anchor_time(OFFSETS, STEP, "view", "top")


def test_the_command_line_names_anchors():
    assert read_anchor("viewpoint/back=a.png").name == "view/back"
    assert read_anchor("global=a=b.png").path.name == "a=b.png"
    for wrong in ("view=a.png", "global/x=a.png", "view/back", "pose/back=a.png"):
        with pytest.raises(ValueError, match="must be global=FILE"):
            read_anchor(wrong)


def test_anchors_are_a_set_told_apart_by_place(model):
    back, happy = anchor(model, "view", "back"), anchor(model, "expression", "happy", 6, 6, seed=6)
    latents, time, given = inputs(model, extra=(back, happy))
    both = model(latents, time, given)
    _, _, swapped = inputs(model, extra=(happy, back))
    close(model(latents, time, swapped), both)
    _, _, moved = inputs(model, extra=(ExtraTokens(back.latents, [model.anchor_time("view", "front")]), happy))
    assert (model(latents, time, moved) - both).abs().max() > 1e-3
    _, _, one = inputs(model, extra=(back,))
    assert (model(latents, time, one) - both).abs().max() > 1e-3


def test_a_latent_hears_its_own_window_alone(model):
    """In a model whose self-attention is shut, a change of sound stays in the latents whose window it is in."""
    model = models.load("gloria_tiny", config=SMALL, seed=3).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
        if ".self_attn.o." in name:
            torch.nn.init.zeros_(parameter)
    latents, time, given = inputs(model)
    changed = given.audio.clone()
    changed[..., WINDOW + 3] = draw(1, 3, 8, seed=9)
    _, _, other = inputs(model, audio=changed)
    moved = (model(latents, time, given) - model(latents, time, other)).abs().amax((0, 1, 3, 4))
    assert moved[1] > 1e-3
    assert moved[0] == moved[2] == 0


def test_audio_attention_equals_float64_of_its_definition(model):
    block, width = model.blocks[0].audio_attn, 10
    y, audio = draw(1, 3 * 24, 48).double(), draw(1, 3, WINDOW, width).double()
    layer = copy.deepcopy(block).double()
    q = torch.nn.functional.rms_norm(layer.q(y), (48,), layer.norm_q.weight, 1e-6).view(3, 24, 2, 24)
    k = torch.nn.functional.rms_norm(layer.k(audio), (48,), layer.norm_k.weight, 1e-6).view(3, WINDOW, 2, 24)
    v = layer.v(audio).view(3, WINDOW, 2, 24)
    weights = (torch.einsum("fnhd,fahd->fhna", q, k) * 24**-0.5).softmax(-1)
    expected = layer.o(torch.einsum("fhna,fahd->fnhd", weights, v).reshape(1, 72, 48))
    conditions = model.encode_conditions(inputs(model)[2])
    from talkingdit.families.wan_s2v.blocks import BlockInputs

    shard = conditions.shard
    got = block(y.float(), audio.float(), BlockInputs(groups=1, layout=conditions.layout, shard=shard))
    close(got.double(), expected)


def test_a_new_model_is_the_video_model_it_began_from(tmp_path):
    torch.manual_seed(0)
    small = {name: value for name, value in SMALL.items() if not name.startswith("audio")}
    source = models.load("wan_i2v_tiny", config=small | {"text_len": 512})
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2)
    save_diffusers(tmp_path, source)
    model = models.load("gloria_tiny", config=SMALL | {"text_len": 512}, seed=1)
    report = initialise_from_video_model(model, tmp_path / "diffusion_pytorch_model.safetensors")
    assert all("audio" in name for name in report.new)
    latents, time, given = inputs(model, text=draw(1, 512, 12))
    peer = WanTransformer3DModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs = peer(torch.cat([latents, given.condition], 1), time, given.text, given.image).sample
        ours = model(latents, time, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_what_is_saved_comes_back_and_is_gloria(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = models.load(tmp_path)
    assert type(again).__name__ == "GloriaModel"
    assert again.config.anchor_offsets == OFFSETS
    latents, time, given = inputs(model)
    close(again(latents, time, given), model(latents, time, given))
    single = models.load(tmp_path / "diffusion_pytorch_model.safetensors", config={"num_heads": 2, "text_len": 6})
    close(single(latents, time, given), model(latents, time, given))


def test_packed_clips_equal_one_by_one(model):
    first, second = inputs(model, frames=3), inputs(model, frames=2, audio=None)
    extra = (anchor(model, "view", "back"),)
    one = WanI2VInputs(**{**vars(second[2]), "extra": extra})
    packed = model.denoise_packed(
        [first[0][0], second[0][0]], [first[1][0], second[1][0]], [first[2], one], held=[1, 0]
    )
    close(packed[0], model(first[0], torch.tensor([[0.0, 700.0, 700.0]]), first[2])[0])
    close(packed[1], model(second[0], second[1], one)[0])


@pytest.mark.parametrize(("name", "billions"), [("gloria_17b", 17.6), ("gloria_5b", 5.9)])
def test_presets_are_as_large_as_the_paper_says(name, billions):
    model = models.load(name, device="meta")
    assert round(model.num_parameters() / 1e9, 1) == billions
    assert len(model.config.audio_inject_layers) * 2 == model.config.num_layers
