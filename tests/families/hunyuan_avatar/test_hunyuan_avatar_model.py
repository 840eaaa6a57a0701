# SPDX-License-Identifier: Apache-2.0
"""The HunyuanVideo-Avatar transformer against numbers of the official one, and against itself along every path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from talkingdit.families.hunyuan_avatar.conditions import AvatarInputs
from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel
from talkingdit.families.hunyuan_avatar.packed import PackedClip
from talkingdit.families.hunyuan_avatar.presets import PRESETS
from talkingdit.families.hunyuan_avatar.step_cache import RELEASED_STEPS, FrameCache, LastBlockCache, computes
from talkingdit.families.hunyuan_avatar.units import ROOT, UNITS, walk
from talkingdit.nn import feed_forward
from talkingdit.nn.units import unit_of

GOLDEN = Path(__file__).parents[2] / "golden" / "hunyuan_avatar.safetensors"
CASES = ["plain", "cfg2_masked_text"]
TOLERANCE = 1e-5
# Three double blocks: one adapter, and a block behind it whose text hears of it.
TINY = {
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_width_ratio": 2,
    "depth_double_blocks": 3,
    "depth_single_blocks": 2,
    "rope_dim_list": (4, 6, 6),
    "text_states_dim": 12,
    "text_states_dim_2": 8,
    "audio_channels": 4,
    "audio_intermediate": 16,
    "adapter_dim": 16,
    "freq_dim": 32,
}


def relative(a, b):
    return ((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt()).item()


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        spec = json.loads(file.metadata()["spec"])
        return spec, {key.removeprefix("base/"): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def official(golden):
    spec, tensors = golden
    model = HunyuanAvatarModel(**spec["variants"]["base"])
    state = {k.removeprefix("state/"): v.float() for k, v in tensors.items() if k.startswith("state/")}
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def golden_inputs(tensors, case):
    found = {k.rsplit("/", 1)[1]: v.float() for k, v in tensors.items() if k.startswith(f"{case}/in/")}
    return dict(
        latents=found["x"],
        timestep=found["t"],
        text=found["text_states"],
        text_mask=found["text_mask"].long(),
        pooled_text=found["text_states_2"],
        reference=found["ref_latents"],
        audio=found["audio_prompts"],
        face_mask=found["face_mask"],
        motion_exp=found["motion_exp"],
        motion_pose=found["motion_pose"],
        fps=found["fps"],
    )


def tiny(seed=0, dtype=torch.float64, **changes):
    """A small model in which no weight is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HunyuanAvatarModel(**TINY | {"zero_init": False} | changes)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
                elif (parameter == 1).all():
                    parameter += torch.randn_like(parameter) * 0.1
    return model.to(dtype).eval()


def inputs(frames=3, height=4, width=6, batch=2, speakers=0, seed=0, dtype=torch.float64):
    """Everything a call takes; text of 3 and 5 tokens. `speakers` adds their axis."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=dtype)

    axis = (speakers,) if speakers else ()
    return dict(
        latents=draw(16, frames, height, width),
        timestep=torch.rand(batch, generator=generator, dtype=dtype) * 1000,
        text=draw(5, 12),
        text_mask=torch.arange(5)[None] < torch.tensor([3, 5])[:batch, None],
        pooled_text=draw(8),
        reference=draw(16, frames, height, width),
        audio=draw(*axis, 4 * frames - 3, 10, 5, 4),
        face_mask=torch.rand(batch, max(speakers, 1), frames, height, width, generator=generator, dtype=dtype),
        motion_exp=draw(4).abs() * 10,
        motion_pose=draw(4).abs() * 10,
        fps=torch.full((batch,), 25.0, dtype=dtype),
    )


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_official_numbers(golden, official, case, gradients):
    _, tensors = golden
    mids = {}
    hooks = [
        module.register_forward_hook(
            lambda _, given, out, name=name: mids.__setitem__(
                name,
                [x.clone() if isinstance(x, torch.Tensor) else x for x in (out if isinstance(out, tuple) else (out,))],
            )
        )
        for name, module in official.named_modules()
    ]
    before = official.double_blocks[0].register_forward_pre_hook(
        lambda _, given: mids.__setitem__("tokens_in", [given[0].clone()])
    )
    try:
        with torch.set_grad_enabled(gradients):
            out = official(**golden_inputs(tensors, case))
    finally:
        for hook in (*hooks, before):
            hook.remove()
    assert relative(out, tensors[f"{case}/out"]) < TOLERANCE
    last = -1  # the sample whose text is the longest

    def check(name, got, cut=lambda x: x):
        assert relative(got, cut(tensors[f"{case}/mid/{name}"])) < TOLERANCE, name

    check("audio_proj_tokens", mids["audio_proj"][0].reshape(tensors[f"{case}/mid/audio_proj_tokens"].shape))
    check("img_embed", mids["img_in"][0])
    check("ref_embed", mids["ref_in"][0])
    check("ref_projected", mids["before_proj"][0])
    check("tokens_in", mids["tokens_in"][0])
    valid = int(tensors[f"{case}/in/text_mask"][last].sum())
    check("text_tokens", mids["txt_in"][0][last, :valid], lambda x: x[last, :valid])
    for block in range(2):
        image, text = mids[f"double_blocks.{block}"]
        check(f"double{block}_img_before_audio", image)
        check(f"double{block}_txt", text[last, :valid], lambda x: x[last, :valid])
        count = image.shape[1] + valid
        check(f"single{block}", mids[f"single_blocks.{block}"][0][last, :count], lambda x, n=count: x[last, :n])
    check("final_tokens", mids["final_layer"][0])


def test_conditions_that_were_made_before_give_the_same(golden, official):
    _, tensors = golden
    given = golden_inputs(tensors, "cfg2_masked_text")
    latents, timestep = given.pop("latents"), given.pop("timestep")
    with torch.no_grad():
        conditions = official.encode_conditions(AvatarInputs(**given))
        assert conditions.audio_memory[0].k.shape[-1] == 16  # both projections are folded into 16 tokens per frame
        for _ in range(2):
            assert relative(official(latents, timestep, conditions), tensors["cfg2_masked_text/out"]) < TOLERANCE


def test_a_step_from_the_cache_is_the_official_one(golden, official):
    _, tensors = golden
    case = "cfg2_masked_text"
    given, cache = golden_inputs(tensors, case), LastBlockCache()
    with torch.no_grad():
        official(**given, cache=cache)
        valid = int(tensors[f"{case}/in/text_mask"][1].sum())
        count = cache.kept.shape[1] - max(valid, 1) + valid
        assert relative(cache.kept[1, :count], tensors[f"{case}/cache/cache_out"][1, :count]) < TOLERANCE
        cache.compute = False
        out = official(**given | {"timestep": tensors[f"{case}/cache/t"], "latents": given["latents"] * 0}, cache=cache)
    assert relative(out, tensors[f"{case}/cache/out"]) < TOLERANCE


def test_windows_find_what_their_frames_left_whichever_window_they_were_in():
    model, cache = tiny(), FrameCache()
    windows = [inputs(3, batch=1, seed=seed) for seed in (1, 2)]
    entered = []
    hook = model.single_blocks[-1].register_forward_pre_hook(lambda _, given: entered.append(given[0].clone()))
    with torch.no_grad():
        want = []
        for frames, given in zip(([0, 1, 2], [3, 4, 5]), windows, strict=True):
            cache.at(frames, compute=True)
            want.append(model(**given, cache=cache))
        cache.at([3, 4, 5], compute=False)
        assert relative(model(**windows[1], cache=cache), want[1]) < 1e-12
        cache.at([2, 3, 4], compute=False)
        model(**windows[1], cache=cache)
        cache.at([5, 6, 7], compute=False)
        assert not cache.skips
    hook.remove()
    first, second, mixed = (x[:, 6:24].unflatten(1, (3, 6)) for x in (entered[0], entered[1], entered[3]))
    assert torch.equal(mixed, torch.cat([first[:, 2:], second[:, :2]], dim=1))


def test_the_released_schedule_of_the_cache():
    assert [step for step in range(50) if computes(step, 50)] == sorted(RELEASED_STEPS)
    assert [computes(step, 10) for step in (0, 9)] == [True, True]


def test_the_released_model_has_the_official_names(golden):
    spec, _ = golden
    with torch.device("meta"):
        model = HunyuanAvatarModel(**PRESETS["hunyuan_avatar_13b"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {
        k: list(v) for k, v in spec["full_keys"].items()
    }
    named = {key: model.config[key] for key in spec["full_config"]}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in named.items()} == spec["full_config"]


def test_every_parameter_belongs_to_a_unit_or_the_root():
    model = tiny(emotion=True)
    for name, _ in model.named_parameters():
        path, unit = unit_of(name, UNITS)
        assert unit is not None or name.startswith(tuple(f"{root}." for root in ROOT)), (name, path)
    called = []
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda m, a, p=path: called.append(p))
        for path in walk(model.config)
    ]
    with torch.no_grad():
        model(**model.double().dummy_inputs)
    for hook in hooks:
        hook.remove()
    assert called == walk(model.config)


def test_a_sample_does_not_depend_on_its_batch():
    model, given = tiny(), inputs()
    with torch.no_grad():
        together = model(**given)
        for i in range(2):
            alone = model(**{k: v[i : i + 1] for k, v in given.items()})
            assert relative(together[i : i + 1], alone) < 1e-12


def test_padding_of_the_text_is_never_read():
    model, given = tiny(), inputs()
    other = given | {"text": given["text"].masked_fill(~given["text_mask"][..., None], 7.0)}
    with torch.no_grad():
        assert torch.equal(model(**given), model(**other))
        short = {k: v[:1] for k, v in given.items()}
        cut = short | {"text": short["text"][:, :3], "text_mask": None}
        assert relative(model(**short), model(**cut)) < 1e-12


def test_large_feed_forwards_run_in_slices(monkeypatch):
    model, given = tiny(), inputs()
    with torch.no_grad():
        want = model(**given)
        monkeypatch.setattr(feed_forward, "FFN_TOKENS", 7)
        assert relative(model(**given), want) < 1e-12
    assert relative(model(**given).detach(), want) < 1e-12


@pytest.mark.parametrize("absorb", ["none", "full"])
def test_several_speakers_are_the_sum_of_each_alone(absorb):
    """The adapter adds, so its first result is a sum over speakers, by hand: the definition of section 3.3."""
    model, given = tiny(audio_absorb=absorb), inputs(speakers=2, batch=1)
    adapter = model.audio_adapter_blocks[0]
    clip = model.encode_conditions(AvatarInputs(**{k: v for k, v in given.items() if k not in ("latents", "timestep")}))
    x = torch.randn(1, 18, 32, dtype=torch.float64)
    masks = torch.nn.functional.interpolate(given["face_mask"], size=(3, 2, 3), mode="nearest").flatten(2)
    masks = masks / masks.sum(1, keepdim=True).clamp(min=1)
    with torch.no_grad():
        tokens = adapter.norm1(model.audio_proj.latent_tokens(given["audio"]))
        want = x.clone()
        for speaker in range(2):
            k, v = adapter.to_kv(tokens[:, speaker]).chunk(2, -1)
            q = adapter.to_q(adapter.norm2(x)).unflatten(1, (3, 6))
            heard = torch.softmax(q @ k.transpose(-1, -2) * 16**-0.5, -1) @ v
            want += masks[:, speaker, :, None] * adapter.to_out(heard).flatten(1, 2)
        got = adapter(x.clone(), clip.audio, clip.audio_weights, clip.shard.frame_spans, None, absorb, True)
    assert relative(got, want) < 1e-6  # masks are read in float32


def test_masks_keep_voices_apart_and_strength_scales_them():
    model, given = tiny(depth_double_blocks=2, depth_single_blocks=0), inputs(speakers=2, batch=1)
    left, right = torch.zeros(1, 1, 1, 4, 6, dtype=torch.float64), torch.zeros(1, 1, 1, 4, 6, dtype=torch.float64)
    left[..., :2], right[..., 4:] = 1, 1
    given["face_mask"] = torch.cat([left, right], dim=1)
    with torch.no_grad():
        want = model(**given)
        other = model(**given | {"audio": torch.cat([given["audio"][:, :1], -given["audio"][:, 1:]], dim=1)})
        moved = (want - other).abs().amax((0, 1, 2, 3))
        assert moved[:4].max() < 1e-12 < moved[4:].min()  # without blocks behind, only the right face hears the change
        silent = model(**given | {"strength": torch.tensor([[1.0, 0.0]])})
        alone = model(**given | {"audio": given["audio"][:, 0], "face_mask": left})
        nobody = model(**given | {"audio": given["audio"][:, :0], "face_mask": None})
    assert relative(silent, alone) < 1e-12
    assert relative(model(**given | {"audio": None, "face_mask": None}).detach(), nobody) < 1e-12
    assert relative(nobody, want) > 1e-4


def test_the_mask_of_a_single_speaker_is_taken_as_it_is():
    """The released model multiplies with it, whatever it holds; only faces that overlap share a token."""
    model, given = tiny(), inputs(batch=1)
    mask = torch.ones_like(given["face_mask"])
    with torch.no_grad():
        want = model(**given | {"face_mask": mask, "strength": 1.5})
        assert relative(model(**given | {"face_mask": 1.5 * mask}), want) < 1e-12
        assert relative(model(**given | {"face_mask": mask}), want) > 1e-6


def test_the_input_of_a_step_is_what_the_first_block_makes_of_it():
    """But for the picture, which is left out: without one, what the first projection is given."""
    model, given = tiny(), inputs(batch=1)
    seen = []
    handle = model.double_blocks[0].img_attn_qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    latents, timestep = given.pop("latents"), given.pop("timestep")
    with torch.no_grad():
        model(latents, timestep, **given | {"reference": None})
        handle.remove()
        found = model.step_input(latents, timestep, AvatarInputs(**given))
    assert found.shape == seen[0].shape
    assert relative(found, seen[0]) < 1e-6


def test_an_emotion_is_a_face_and_not_a_bag_of_its_patches():
    model, given = tiny(emotion=True, depth_double_blocks=2, depth_single_blocks=0), inputs(batch=1)
    face = torch.randn(1, 1, 16, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole, moved = (model(**given, emotion=picture) for picture in (face, face.roll(2, dims=-1)))  # by a patch
    assert relative(moved, whole) > 1e-4


def test_frames_follow_the_emotion_of_their_place_in_the_track():
    model, given = tiny(emotion=True, depth_double_blocks=2, depth_single_blocks=0), inputs(batch=1)
    faces = torch.randn(1, 2, 16, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        first, second = (model(**given, emotion=faces, emotion_index=[[i] * 3]) for i in range(2))
        track = model(**given, emotion=faces, emotion_index=torch.tensor([[0, -1, 1]]))
        neutral = model(**given)
        off = model(**given, emotion=faces, emotion_strength=0.0)
        half, full = (
            model(**given, emotion=faces, emotion_index=[[-1, 0, -1]], emotion_strength=s) for s in (0.5, 1.0)
        )
    for frame, want in ((0, first), (1, neutral), (2, second)):
        assert relative(track[:, :, frame], want[:, :, frame]) < 1e-12
    assert relative(off, neutral) < 1e-12 < relative(first, second)
    assert relative(half, neutral) < relative(full, neutral)
    with pytest.raises(ValueError, match="emotion needs a model with an emotion module"):
        tiny()(**given, emotion=faces)
    with pytest.raises(ValueError, match="emotion_index must be -1 or one of 2 references, got -1 to 2"):
        model(**given, emotion=faces, emotion_index=[[-1, 0, 2]])


def test_ways_of_the_picture_are_switches():
    given = inputs(batch=1)
    names = ("reference_tokens", "reference_channels", "reference_projection")
    for ways in ((True, False, False), (False, True, False), (False, False, True), (True, True, False)):
        model = tiny(**dict(zip(names, ways, strict=True)))
        assert (model.ref_in is not None, model.img_in.proj.weight.shape[1]) == (ways[2], 32 if ways[1] else 16)
        with torch.no_grad():
            out = model(**given)
            assert relative(model(**given | {"reference": -given["reference"]}), out) > 1e-4, ways
            one = given["reference"][:, :, :1]
            repeated = model(**given | {"reference": one.expand(-1, -1, 3, -1, -1)})
            assert relative(model(**given | {"reference": one}), repeated) < 1e-12
            assert relative(model(**given | {"reference": None}), out) > 1e-4
    shifted = tiny(reference_shift=True)
    with torch.no_grad():
        assert relative(shifted(**given), tiny()(**given)) > 1e-5


def test_packed_clips_give_what_each_gives_alone():
    model = tiny(emotion=True)
    clips = [
        dict(
            inputs(3, 4, 6, 1, seed=1),
            emotion=torch.randn(1, 2, 16, 1, 4, 4, dtype=torch.float64),
            emotion_index=torch.tensor([[1, -1, 0]]),
        ),
        inputs(2, 6, 4, 1, speakers=2, seed=2),
        {k: v for k, v in inputs(1, 4, 4, 1, seed=3).items() if k not in ("reference", "audio", "face_mask")},
        inputs(1, 4, 4, 1, seed=4),
    ]
    alike = [inputs(2, 4, 6, 1, seed=seed) for seed in (5, 6)]
    clips[1]["text_mask"] = None
    for batch in (clips, alike):
        packed = [PackedClip(**{k: v[0] for k, v in clip.items() if v is not None}) for clip in batch]
        for trains in (False, True):
            with torch.set_grad_enabled(trains):
                for got, clip in zip(model.denoise_packed(packed), batch, strict=True):
                    assert relative(got[None], model(**clip)) < 1e-6  # parts of the vector are sums in float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": torch.zeros(1, 8, 10, 5, 4)}, r"audio must have features for every video frame, 9 for 3 latent fra"),
        ({"audio": torch.zeros(1, 9, 10, 4, 4)}, r"audio must have shape \[1, 9, 10, 5, 4\], got \[1, 9, 10, 4, 4\]"),
        (
            {"face_mask": torch.zeros(1, 2, 1, 4, 6)},
            r"face_mask must have shape \[1, 1, 1, 4, 6\], got \[1, 2, 1, 4, 6",
        ),
        ({"text": torch.zeros(1, 5, 13)}, r"text must have shape \[B, L, 12\], got \[1, 5, 13\]"),
        ({"reference": torch.zeros(1, 16, 2, 4, 6)}, r"reference must have shape \[1, 16, 3, 4, 6\], got"),
        ({"latents": torch.zeros(1, 16, 3, 5, 6)}, r"latents must have even height and width, got 5 x 6"),
        ({"timestep": torch.zeros(2)}, r"timestep must have shape \[1\], got \[2\]"),
        ({"motion_exp": torch.zeros(1, 3)}, r"motion_exp must have shape \[1, 4\], got \[1, 3\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**inputs(batch=1) | change)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"rope_dim_list must be three even numbers that add up to the 16 channels"):
        HunyuanAvatarModel(**TINY | {"rope_dim_list": (16, 56, 56)})
    with pytest.raises(ValueError, match="audio_absorb must be one of none, full, got 'value'"):
        HunyuanAvatarModel(**TINY | {"audio_absorb": "value"})


def test_gradients_reach_every_weight_and_checkpointing_changes_none():
    model, given = tiny(emotion=True), inputs(batch=1)
    given["emotion"] = torch.randn(1, 1, 16, 1, 4, 4, dtype=torch.float64)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(**given).square().sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(gradient, found[1][name], rtol=1e-9, atol=1e-12), name
    model.zero_grad()
    model(given["latents"], given["timestep"], given["text"]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
