# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo-Avatar with its sequence shared by several processes: what a single one computes, to rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from test_hunyuan_avatar_model import inputs, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from talkingdit.families.hunyuan_avatar.conditions import AvatarInputs
from talkingdit.families.hunyuan_avatar.packed import PackedClip
from talkingdit.families.hunyuan_avatar.sequence import ClipSpan, sequence_shard
from talkingdit.families.hunyuan_avatar.units import UNITS
from talkingdit.nn.context_parallel import ContextParallel
from talkingdit.nn.units import modules_of

LAYOUTS = [(1, 2, "gather"), (2, 1, "ring"), (2, 2, "gather"), (2, 2, "ring")]
PATIENCE = 240
EXACT = 1e-10  # in float64, where nothing but the order of additions differs


def context_of(ring, ulysses, mode):
    return ContextParallel.from_mesh(init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses")), mode)


def difference(a, b):
    return (a - b).abs().max().item() / max(b.abs().max().item(), 1e-30) if b.numel() else 0.0


def clips():
    """Three clips: voices and emotions, two speakers, and neither voice nor picture; frames of 6, 6 and 4 tokens."""
    faces = torch.linspace(-1, 1, 2 * 16 * 16, dtype=torch.float64).view(1, 2, 16, 1, 4, 4)
    given = [
        dict(inputs(3, 4, 6, 1, seed=1), emotion=faces, emotion_index=torch.tensor([[1, -1, 0]])),
        inputs(2, 6, 4, 1, speakers=2, seed=2),
        {k: v for k, v in inputs(1, 4, 4, 1, seed=3).items() if k not in ("reference", "audio", "face_mask")},
    ]
    return [PackedClip(**{k: v[0] for k, v in clip.items()}) for clip in given]


def run(model, given, context=None):
    if "packed" in given:
        return model.denoise_packed(given["packed"], context=context)
    return [model(**given, context=context)]


def case(name):
    faces = torch.linspace(-1, 1, 2 * 2 * 16 * 16, dtype=torch.float64).view(2, 2, 16, 1, 4, 4)
    if name == "everything":
        track = torch.tensor([[0, 1, 1], [-1, 0, -1]])
        return dict(inputs(speakers=2), emotion=faces, emotion_index=track)
    if name == "bare":
        return {k: v for k, v in inputs(batch=1).items() if k in ("latents", "timestep", "text")}
    assert name == "packed"
    return dict(packed=clips())


def train(layout, names):
    context, model = context_of(*layout), tiny(num_heads=4, rope_dim_list=(4, 2, 2), emotion=True)
    for name in names:
        given = case(name)
        found = []
        for shared in (None, context):
            model.zero_grad()
            outs = run(model, given, shared)
            generator = torch.Generator().manual_seed(7)
            sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in outs).backward()
            gradients = {}
            for path, parameter in model.named_parameters():
                assert parameter.grad is not None, path
                gradients[path] = parameter.grad.clone()
                if shared is not None:
                    dist.all_reduce(gradients[path])
            found.append((outs, gradients))
        (want, want_gradients), (got, gradients) = found
        for a, b in zip(got, want, strict=True):
            assert difference(a, b) < EXACT
        largest = max(gradient.abs().max().item() for gradient in want_gradients.values())
        for path, gradient in want_gradients.items():
            assert (gradients[path] - gradient).abs().max().item() < EXACT * largest, path
        if name == "everything":
            inference(model, given, context)


def inference(model, given, context):
    given = dict(given)
    latents, timestep = given.pop("latents"), given.pop("timestep")
    with torch.no_grad():
        want = model(latents, timestep, model.encode_conditions(AvatarInputs(**given)))
        conditions = model.encode_conditions(AvatarInputs(**given), context=context)
        assert difference(model(latents, timestep, conditions), want) < EXACT


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_velocity_and_gradients_equal_the_single_process(processes, layout):
    processes(layout[0] * layout[1], train, layout, ["everything", "packed", "bare"], timeout=PATIENCE)


def train_sharded(ring, ulysses):
    """Two ranks: weights sharded over both, which share a sequence or have batches with other conditions each."""
    model, reference = (tiny(num_heads=4, rope_dim_list=(4, 2, 2), emotion=True) for _ in range(2))
    for _, unit, _ in list(modules_of(model, UNITS)):
        fully_shard(unit)
    fully_shard(model)
    for name in model.forward_methods:
        register_fsdp_forward_method(model, name)
    context = None if ring * ulysses == 1 else context_of(ring, ulysses, "gather")
    batches = [case("packed"), case("bare"), case("everything")]
    for given, other in itertools.pairwise(batches):
        model.zero_grad()
        reference.zero_grad()
        own = other if context is None and dist.get_rank() == 1 else given
        sum(v.square().sum() for v in run(model, own, context)).backward()
        for one in [given] + ([other] if context is None else []):
            sum(v.square().sum() for v in run(reference, one)).backward()
        for (name, got), want in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert difference(2 * got.grad.full_tensor(), want.grad) < 1e-8, name  # FSDP divides by the ranks


@pytest.mark.parametrize("layout", [(1, 1), (1, 2), (2, 1)], ids=["data", "ulysses", "ring"])
def test_sharded_weights_with_other_conditions_on_every_rank(processes, layout):
    processes(2, train_sharded, *layout, timeout=PATIENCE)


class Fixed:
    """A context of which only the shards are asked for."""

    def __init__(self, begin, end):
        self.range = begin, end

    def shard(self, tokens):
        return self.range


def test_every_token_is_held_once_and_where_it_belongs():
    spans, begin = [], 0
    for reference, grid, text in ((6, (2, 2, 3), 3), (0, (1, 2, 2), 1), (6, (3, 2, 3), 4)):
        spans.append(ClipSpan(begin, reference, grid, text))
        begin += spans[-1].tokens
    whole = torch.arange(begin, dtype=torch.float64)[None, :, None]
    image, text = sequence_shard(spans).split(whole)
    for cuts in ([0, 9, 14, 22, begin], [0, 1, 21, 30, begin], [0, 6, 18, 21, begin]):
        parts = []
        for first, last in itertools.pairwise(cuts):
            shard = sequence_shard(spans, Fixed(first, last), packed=True)
            own = whole[:, first:last]
            local_image, local_text = shard.split(own)
            assert torch.equal(shard.join(local_image, local_text), own)
            for got, all_of, kind in ((local_image, image, "image"), (local_text, text, "text")):
                if got.shape[1]:
                    offset = shard.offset(kind)
                    assert torch.equal(got, all_of[:, offset : offset + got.shape[1]])
            assert sum(span.tokens for span in shard.frame_spans) == sum(b - a for a, b in shard.video)
            parts.append(own)
        assert torch.equal(torch.cat(parts, dim=1), whole)
