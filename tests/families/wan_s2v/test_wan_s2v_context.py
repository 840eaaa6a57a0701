# SPDX-License-Identifier: Apache-2.0
"""Wan-S2V with its sequence shared by several processes: what a single process computes, to rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from test_wan_s2v_model import denoise, inputs, relative, tiny
from test_wan_s2v_packed import clips
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.sequence import ClipSpan, sequence_shard
from talkingdit.nn.audio_cross_attention import TokenSpan
from talkingdit.nn.context_parallel import ContextParallel

LAYOUTS = [(1, 2, "gather"), (2, 1, "gather"), (2, 1, "ring"), (2, 2, "gather"), (2, 2, "ring"), (1, 4, "gather")]
PATIENCE = 240  # seconds: the first job of a worker waits for its imports
EXACT = 1e-10  # in float64, where nothing but the order of additions differs


def context_of(ring, ulysses, mode):
    mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    return ContextParallel.from_mesh(mesh, mode)


def double(values):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()}


def difference(a, b):
    return (a - b).abs().max().item() / max(b.abs().max().item(), 1e-30) if b.numel() else 0.0


def run(model, given, context=None):
    """The velocities of packed clips, or of latents with inputs by their names."""
    if "packed" in given:
        return model.denoise_packed(given["packed"], context=context)
    return denoise(model, **given, context=context)


def velocity_and_gradients(model, given, context):
    """Whole velocity, and gradients of its product with some weights; over a context their sum."""
    model.zero_grad()
    out = run(model, given, context)
    outs = out if isinstance(out, list) else [out]
    generator = torch.Generator().manual_seed(7)
    loss = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in outs)
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients[name] = parameter.grad.clone()
        if context is not None:
            dist.all_reduce(gradients[name])
    return outs, gradients


def check(model, given, context, tolerance=EXACT):
    want, want_gradients = velocity_and_gradients(model, given, None)
    got, gradients = velocity_and_gradients(model, given, context)
    for a, b in zip(got, want, strict=True):
        assert difference(a, b) < tolerance
    largest = max(gradient.abs().max().item() for gradient in want_gradients.values())
    for name, want_gradient in want_gradients.items():
        assert (gradients[name] - want_gradient).abs().max().item() < tolerance * largest, name


def case(name):
    """A model and inputs. 127 tokens: four shards of 32 and 31, of which the last are history alone; frames of 24."""
    given = double(inputs())
    if name == "everything":
        return tiny(num_heads=4), given
    if name == "masked":
        given |= dict(lengths=[3, 2], history_lengths=[2, 7], drop_history=[False, True], drop_reference=[True, False])
        given["text_mask"] = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
        return tiny(num_heads=4), given
    if name == "time per frame":
        given["timestep"] = given["timestep"][:, None] * torch.tensor([0.0, 0.5, 1.0]).double()
        return tiny(num_heads=4), given
    if name == "bare":
        kept = {k: given[k] for k in ("latents", "timestep", "text")}
        return tiny(num_heads=4), kept
    if name == "absorbed":
        return tiny(num_heads=4, audio_absorb="value"), given
    if name == "unpacked history":
        return tiny(num_heads=4, enable_framepack=False, enable_adain=False), given
    if name == "one token":
        kept = {k: given[k] for k in ("latents", "timestep", "text")}
        kept["latents"] = kept["latents"][:, :, :1, :2, :2]
        return tiny(num_heads=4), kept
    assert name == "packed"
    return tiny(num_heads=4), dict(packed=clips(torch.float64))


def train(layout, names):
    context = context_of(*layout)
    for name in names:
        model, given = case(name)
        check(model.double(), given, context)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_velocity_and_gradients_equal_the_single_process(processes, layout):
    processes(layout[0] * layout[1], train, layout, ["everything", "masked", "packed"], timeout=PATIENCE)


def test_every_kind_of_input_is_shared(processes):
    names = ["time per frame", "bare", "absorbed", "unpacked history", "one token"]
    processes(4, train, (2, 2, "gather"), names, timeout=PATIENCE)


def train_in_float32(layout):
    model, given = tiny(num_heads=4), inputs()
    check(model, given, context_of(*layout), 1e-5)
    model.enable_gradient_checkpointing()
    check(model, given, context_of(*layout), 1e-5)


def test_float32_and_gradient_checkpointing(processes):
    processes(2, train_in_float32, (1, 2, "gather"), timeout=PATIENCE)


def infer(layout):
    context = context_of(*layout)
    for absorb in ("none", "value"):
        model = tiny(num_heads=4, audio_absorb=absorb).double().eval()
        for given in (double(inputs()), double(inputs()) | dict(reference=None, history=None)):
            latents, timestep = given.pop("latents"), given.pop("timestep")
            with torch.no_grad():
                want = model(latents, timestep, conditions=model.encode_conditions(WanInputs(**given, size=(3, 12, 8))))
                conditions = model.encode_conditions(WanInputs(**given, size=(3, 12, 8)), context=context)
                begin, end = context.shard(len(conditions.layout))
                frames = {frame // 24 for frame in range(begin, min(end, 72))} or {0}
                assert conditions.audio_kv[0].k.shape[1] == len(frames)  # of the frames here, not of all
                for arguments in (dict(context=context), {}):
                    assert difference(model(latents, timestep, conditions=conditions, **arguments), want) < EXACT
                assert difference(denoise(model, latents, timestep, context, **given), want) < EXACT
                with pytest.raises(ValueError, match="conditions were made for another context, or without one"):
                    model(
                        latents,
                        timestep,
                        conditions=model.encode_conditions(WanInputs(**given, size=(3, 12, 8))),
                        context=context,
                    )
    return True


@pytest.mark.parametrize("layout", [(1, 2, "gather"), (2, 2, "gather")], ids=str)
def test_inference_with_conditions_made_once(processes, layout):
    processes(layout[0] * layout[1], infer, layout, timeout=PATIENCE)


def shard_units(model, wide=None, narrow=None):
    """FSDP2 as in training: every unit by itself, what has few weights with the root."""
    edges = [model.time_embedding, model.time_projection, model.casual_audio_encoder, model.head]
    for unit in edges:
        fully_shard(unit, mp_policy=wide or MixedPrecisionPolicy())
    inner = [*model.blocks, *model.audio_injector.injector, *model.audio_injector.injector_adain_layers]
    for unit in [*inner, model.text_embedding, model]:
        fully_shard(unit, mp_policy=narrow or MixedPrecisionPolicy())
    for name in model.forward_methods:
        register_fsdp_forward_method(model, name)


def train_sharded(ring, ulysses):
    """Two ranks: weights sharded over both, which share a sequence or have batches with other conditions each."""
    model, reference = tiny(num_heads=4).double(), tiny(num_heads=4).double()
    shard_units(model)
    context = None if ring * ulysses == 1 else context_of(ring, ulysses, "gather")
    batches = [
        dict(packed=clips(torch.float64)),
        double(inputs(seed=3)) | dict(reference=None, history=None, pose=None, audio=None),
        double(inputs(seed=4)) | dict(drop_history=True),
        dict(packed=clips(torch.float64)[2:3]),
    ]

    def learn(network, given, context=None):
        out = run(network, given, context)
        sum(v.square().sum() for v in (out if isinstance(out, list) else [out])).backward()

    for i, (given, other) in enumerate(itertools.pairwise(batches)):
        if i == 1:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        reference.zero_grad()
        learn(model, other if context is None and dist.get_rank() == 1 else given, context)
        learn(reference, given)
        if context is None:
            learn(reference, other)
        for (name, got), want in zip(model.named_parameters(), reference.parameters(), strict=True):
            total = 2 * got.grad.full_tensor()  # FSDP divides by the number of ranks
            assert difference(total, want.grad) < 1e-8, name
    given = double(inputs())
    latents, timestep = given.pop("latents"), given.pop("timestep")
    with torch.no_grad():  # a validation video
        conditions = model.encode_conditions(WanInputs(**given), context=context)
        want = denoise(reference, latents, timestep, **given)
        assert difference(model(latents, timestep, conditions=conditions), want) < EXACT


@pytest.mark.parametrize("layout", [(1, 1), (1, 2), (2, 1)], ids=["data", "ulysses", "ring"])
def test_sharded_weights_with_other_conditions_on_every_rank(processes, layout):
    processes(2, train_sharded, *layout, timeout=PATIENCE)


def train_in_mixed_precision():
    model, exact = tiny(num_heads=4), tiny(num_heads=4)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    shard_units(model, wide, narrow)
    residual, linear = set(), set()
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_hook(lambda _m, _i, out: linear.add(out.dtype))
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: residual.add(out.dtype))
    context = context_of(1, 2, "gather")
    for given in (inputs(), dict(packed=clips())):
        out = run(model, given, context)
        want = run(exact, given)
        for a, b in zip(out, want, strict=True):
            assert a.dtype == torch.float32
            assert relative(a, b) < 5e-2
        sum(v.square().mean() for v in out).backward()
    assert (residual, linear) == ({torch.float32}, {torch.bfloat16})
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_bf16_blocks_with_a_float32_residual_stream_and_edges(processes):
    processes(2, train_in_mixed_precision, timeout=PATIENCE)


class Fixed:
    """A context of which only the shards are asked for."""

    def __init__(self, begin, end):
        self.place = (begin, end)

    def shard(self, tokens):
        assert self.place[1] <= tokens
        return self.place


def test_shards_of_a_packed_sequence():
    """Clips of 3 and 2 frames of 4 tokens with 5 others each, then one of a frame of 6 tokens alone."""
    places = [ClipSpan(0, (3, 2, 2), 17), ClipSpan(17, (2, 2, 2), 13), ClipSpan(30, (1, 2, 3), 6)]
    shard = sequence_shard(places, Fixed(6, 27), packed=True)
    assert shard.clip_noisy == ((6, 12), (0, 8), (0, 0))
    assert shard.clip_clean == ((0, 5), (0, 2), (0, 0))
    assert shard.clip_frames == ((1, 3), (0, 2), (0, 0))
    assert shard.noisy_offset == 6
    assert shard.noisy_ranges == ((0, 6), (11, 19))
    assert shard.frame_spans == (
        TokenSpan(14, 4, 4, 2),
    )  # frames of one size, one call: 2 tokens of a cut one, then 12
    assert (shard.local_clips, shard.clip_ranges) == ((0, 2), ((0, 11), (11, 21)))
    assert shard.segments == [17, 30, 36]
    shard = sequence_shard(places, Fixed(12, 15), packed=True)  # history alone
    assert (shard.clip_noisy, shard.noisy_ranges, shard.frame_spans) == (
        ((12, 12), (0, 0), (0, 0)),
        ((0, 0),),
        (TokenSpan(0, 1, 4),),
    )
    assert (shard.clip_frames[0], shard.local_clips, shard.clip_ranges) == ((0, 1), (0, 1), ((0, 3),))
    shard = sequence_shard(places, Fixed(20, 36), packed=True)
    assert shard.frame_spans == (TokenSpan(5, 2, 4, 3), TokenSpan(6, 1, 6))
    assert shard.noisy_offset == 15
    assert sequence_shard(places[2:], None).frame_spans == (TokenSpan(6, 1, 6),)
