# SPDX-License-Identifier: Apache-2.0
"""Clips of different sizes in one sequence: what each gives alone, and what they give stacked with padding."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from test_wan_s2v_model import denoise, inputs, relative, tiny

from talkingdit.families.wan_s2v.packed import PackedClip
from talkingdit.families.wan_s2v.sequence import tokens_of

TOLERANCE = 1e-5


def clip(frames=2, height=4, width=6, seed=0, past=None, dtype=torch.float32, **gone):
    """A clip with everything but what `gone` says, such as pose=None."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    given = dict(
        latents=draw(16, frames, height, width),
        timestep=torch.rand((), generator=generator, dtype=dtype) * 1000,
        text=draw(4, 12),
        reference=draw(16, 1, height, width),
        history=draw(16, 7 if past is None else past, height, width),
        pose=draw(16, frames, height, width),
        audio=draw(2, 8, 4 * frames),
        audio_history=draw(2, 8, 3),
    )
    return PackedClip(**given | gone)


def clips(dtype=torch.float32):
    """Different lengths, sizes and conditions: frames of 6, 6, 12 and 6 tokens."""
    bare = dict(reference=None, history=None, pose=None, audio=None, audio_history=None)
    mask = torch.tensor([True, True, False, False])
    return [
        clip(3, 4, 6, 0, dtype=dtype),
        clip(1, 4, 6, 1, dtype=dtype, audio_history=None, text_mask=mask),
        clip(2, 8, 6, 2, dtype=dtype, **bare),
        clip(2, 4, 6, 3, dtype=dtype, drop_history=True, pose=None, text=torch.ones(6, 12, dtype=dtype)),
        clip(1, 4, 6, 4, dtype=dtype, past=3, reference=None, audio=None, audio_history=None),
    ]


def alone(model, one):
    """The same clip by the plain call."""
    given = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    return denoise(model, **{k: v[None] if isinstance(v, torch.Tensor) else v for k, v in given.items()})[0]


def gradients(model, velocities):
    model.zero_grad()
    generator = torch.Generator().manual_seed(7)
    sum((v * torch.randn(v.shape, generator=generator)).sum() for v in velocities).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(got, want):
    assert got.keys() == want.keys()
    largest = max(gradient.abs().max() for gradient in want.values())
    for name, gradient in want.items():
        assert (got[name] - gradient).abs().max() < TOLERANCE * largest, name


@pytest.mark.parametrize(
    "switches",
    [
        {},
        dict(enable_framepack=False),
        dict(zero_timestep=False),
        dict(enable_adain=False, residual_dtype="compute"),
        dict(audio_absorb="value"),
    ],
    ids=lambda s: "_".join(map(str, s)) or "default",
)
def test_packed_equals_one_by_one(switches):
    model = tiny(**switches)
    packed = model.denoise_packed(clips())
    got = gradients(model, packed)
    single = [alone(model, one) for one in clips()]
    for a, b in zip(packed, single, strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < TOLERANCE
    same_gradients(got, gradients(model, single))
    with torch.no_grad():  # the path that overwrites
        for a, b in zip(model.denoise_packed(clips()), single, strict=True):
            assert relative(a, b) < TOLERANCE


def test_packed_equals_stacked_with_padding():
    model = tiny()
    lengths, given = [3, 1, 2], inputs(batch=3)
    stacked = denoise(model, **given, lengths=lengths)
    single = [{k: v[i] for k, v in given.items()} for i in range(3)]
    packed = []
    for one, n in zip(single, lengths, strict=True):
        cut = dict(latents=one["latents"][:, :n], pose=one["pose"][:, :n], audio=one["audio"][..., : 4 * n])
        packed.append(PackedClip(**one | cut))
    velocities = model.denoise_packed(packed)
    wanted = [stacked[i, :, :n] for i, n in enumerate(lengths)]
    for a, b in zip(velocities, wanted, strict=True):
        assert relative(a, b) < TOLERANCE
    got = gradients(model, velocities)
    same_gradients(got, gradients(model, wanted))


def test_clips_do_not_see_each_other():
    model = tiny()
    before = model.denoise_packed(clips())
    changed = clips()
    changed[1] = clip(2, 6, 4, 9)
    after = model.denoise_packed(changed)
    for i in (0, 2, 3, 4):
        assert relative(after[i], before[i]) < TOLERANCE


def test_a_timestep_per_latent_frame():
    model = tiny()
    packed = [
        dataclasses.replace(one, timestep=torch.linspace(0, 900, one.latents.shape[1])) if i % 2 == 0 else one
        for i, one in enumerate(clips())
    ]
    with torch.no_grad():
        for a, one in zip(model.denoise_packed(packed), packed, strict=True):
            assert relative(a, alone(model, one)) < TOLERANCE


def test_bf16_blocks_with_float32_edges():
    """The mix of a mixed precision policy: what stays float32 gets what bfloat16 layers make, and the other way."""
    model = tiny()
    exact = model.denoise_packed(clips())
    for module in (model.blocks, model.audio_injector, model.text_embedding):
        module.to(torch.bfloat16)
    for name in ("patch_embedding", "cond_encoder", "trainable_cond_mask", "frame_packer"):
        getattr(model, name).to(torch.bfloat16)
    assert model.head.head.weight.dtype == model.casual_audio_encoder.weights.dtype == torch.float32
    seen = []
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    residual = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: residual.append(out.dtype))
    for velocities in (model.denoise_packed(clips()), [alone(model, one) for one in clips()]):
        assert {v.dtype for v in velocities} == {torch.float32}
        assert max(relative(a, b) for a, b in zip(velocities, exact, strict=True)) < 5e-2
        assert set(gradients(model, velocities)) == {name for name, _ in model.named_parameters()}
    assert set(seen) == {torch.bfloat16}  # no product of a block in float32
    assert set(residual) == {torch.float32}


UNITS = ("blocks.", "audio_injector.injector.", "audio_injector.injector_adain_layers.")
SINGLE_UNITS = ("text_embedding", "time_embedding", "time_projection", "casual_audio_encoder", "head")


def counted(model):
    """Calls of every unit that is sharded by itself."""
    calls = Counter()
    for name, module in model.named_modules():
        nested = any(name.startswith(unit) and name.count(".") == unit.count(".") for unit in UNITS)
        if nested or name in SINGLE_UNITS:
            calls[name] = 0
            module.register_forward_pre_hook(lambda _m, _i, name=name: calls.update([name]))
    assert len(calls) == 3 + 2 + 2 + 5
    return calls


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["padd", "drop"])
def test_every_unit_runs_once_and_every_weight_gets_a_gradient_whatever_is_absent(packed, mode):
    """Else processes with different batches would wait for each other for ever."""
    model = tiny(framepack_drop_mode=mode)
    calls = counted(model)
    names = ("reference", "history", "pose", "audio")
    choices = [dict.fromkeys(gone) for n in range(5) for gone in itertools.combinations(names, n)]
    choices += [dict(drop_history=True, drop_reference=True), dict(add_last_motion=0), dict(add_last_motion=1)]
    for changes in choices:
        calls.subtract(calls)
        model.zero_grad()
        if packed:
            sum(
                v.sum() for v in model.denoise_packed([clip(2, 4, 4, 0, **changes), clip(1, 4, 6, 1, **changes)])
            ).backward()
        else:
            denoise(model, **inputs(frames=2, height=4, width=4) | changes).sum().backward()
        assert set(calls.values()) == {1}, (changes, calls)
        assert [name for name, p in model.named_parameters() if p.grad is None] == [], changes


@pytest.mark.parametrize("switches", [{}, dict(cond_dim=0), dict(enable_framepack=False)])
def test_dummy_inputs_go_through_every_unit(switches):
    model = tiny(**switches)
    calls, given = counted(model), model.dummy_inputs
    assert model(**given).shape == given["latents"].shape
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("switches", [{}, dict(enable_framepack=False), dict(framepack_drop_mode="drop")])
def test_tokens_of_tells_the_length_of_the_sequence(switches):
    for last, padding in itertools.product((True, False), ("none", "replicate")):
        model = tiny(add_last_motion=last, framepack_padding=padding, **switches)
        seen = []
        model.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))  # noqa: B023
        for height, reference, history in itertools.product((4, 10), (True, False), (True, False)):
            gone = ({} if reference else dict(reference=None)) | ({} if history else dict(history=None))
            with torch.no_grad():
                model.denoise_packed([clip(2, height, 6, **gone)])
            past = history if model.config.enable_framepack else 7 * history
            assert tokens_of(model.config, 2, height, 6, reference, past) == seen.pop()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(latents=torch.zeros(16, 2, 5, 6)), r"even height and width, got 5 x 6 \(packed clip 1\)"),
        (dict(timestep=torch.zeros(3)), r"timestep must have shape \[B\] = \[1\] or .*got \[1, 3\] \(packed clip 1\)"),
        (dict(audio=torch.zeros(2, 8, 9)), r"8 for 2 frames, got 9 \(packed clip 1\)"),
        (dict(reference=torch.zeros(16, 1, 6, 6)), r"reference must have shape .*\(packed clip 1\)"),
        (dict(add_last_motion=3), r"add_last_motion must be 0, 1 or 2, got 3 \(packed clip 1\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_the_clip(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny().denoise_packed([clip(), dataclasses.replace(clip(), **changes)])


def test_what_cannot_be_packed_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="denoise_packed must be given at least one clip"):
        model.denoise_packed([])
    with pytest.raises(TypeError, match="unexpected keyword argument 'text'"):
        model.denoise_packed([clip()], text=torch.zeros(1, 4, 12))
    with pytest.raises(ValueError, match=r"at most 128 groups .*\(two per clip\), got 130 of 65 clips"):
        model.denoise_packed([clip()] * 65)
    one = dataclasses.replace(clip(), timestep=torch.zeros(2))
    with pytest.raises(ValueError, match=r"needs zero_timestep, got a model without it \(packed clip 0\)"):
        tiny(zero_timestep=False).denoise_packed([one])
