# SPDX-License-Identifier: Apache-2.0
"""accelerate() and object_patches() on classes with the attributes and signatures of ComfyUI's Wan transformers."""

from __future__ import annotations

import types

import comfy_standin
import pytest
import torch
from comfy_standin import AudioBlock, WanModel
from test_accelerate_diffusers import Ops, attributes, difference
from tiny_diffusers import randomise

import talkingdit
from talkingdit.nn.accelerate.comfy_wan import object_patches

BLOCK = "block: norm, modulation and gates"
ATTENTION = "self-attention: norm and rotation of q and k"


def inputs(parts=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = dict(x=(2, 26, 48), e=(2, parts, 6, 48) if parts else (2, 6, 48), context=(2, 5, 48))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def run(model, given, **options):
    with torch.no_grad():
        return model(**given, transformer_options=options)


@pytest.mark.parametrize(
    ("switches", "parts"),
    [
        ({}, 0),
        ({}, 1),
        ({}, 2),
        ({}, 7),  # 26 tokens: six parts of four and one of two
        ({}, 26),
        ({"control": True}, 0),
        ({"qk_norm": False}, 0),
        ({"cross_attn_norm": False}, 2),
    ],
)
def test_same_numbers(switches, parts):
    model, given = randomise(WanModel(**switches)), inputs(parts)
    expected, state = run(model, given), attributes(model)
    report = talkingdit.accelerate(model)
    blocks = 4 if switches.get("control") else 2
    assert report.replaced == {BLOCK: blocks, ATTENTION: blocks}
    assert not report.left
    with Ops() as ops:
        assert difference(run(model, given), expected) < 1e-6
    # q and k are two calls below the public ones.
    assert ops.calls["qk_norm_rope3d" if switches.get("qk_norm", True) else "rope3d"] == 2 * blocks
    assert ops.calls["norm_modulate"] >= blocks
    talkingdit.restore(model)
    assert attributes(model) == state
    assert torch.equal(run(model, given), expected)


def test_half_precision_is_no_further_from_the_truth():
    model, given = randomise(WanModel()).bfloat16(), inputs(7, torch.bfloat16)
    theirs = run(model, given)
    talkingdit.accelerate(model)
    ours = run(model, given)
    talkingdit.restore(model)
    truth = run(model.double(), {name: value.double() for name, value in given.items()})
    assert ours.dtype == torch.bfloat16
    assert difference(ours, truth) < 1.2 * difference(theirs, truth)


def test_patches_change_a_model_only_while_they_are_in():
    """As ComfyUI's patcher has it: `setattr` of what there is, and `setattr` of what was there before."""
    model, given = randomise(WanModel()), inputs()
    expected, state = run(model, given), attributes(model)
    patches, report = object_patches(model)
    assert set(patches) == {f"blocks.{n}.{part}forward" for n in range(2) for part in ("", "self_attn.")}
    assert report.replaced == {BLOCK: 2, ATTENTION: 2}
    assert attributes(model) == state

    before = {}
    for _ in range(2):
        for name, function in patches.items():
            module = model.get_submodule(name.rpartition(".")[0])
            before[name] = module.forward
            module.forward = function
        with Ops() as ops:
            assert difference(run(model, given), expected) < 1e-6
        assert ops.calls["qk_norm_rope3d"] == 4
        # While another workflow's patches are in, and after they were taken out, the same goes where it went.
        assert object_patches(model)[1].replaced == report.replaced
        for name, function in before.items():
            model.get_submodule(name.rpartition(".")[0]).forward = function
        with Ops() as ops:
            assert torch.equal(run(model, given), expected)
        assert not ops.calls
        assert object_patches(model)[1].replaced == report.replaced


def test_what_other_nodes_patch_is_theirs():
    model = randomise(WanModel())
    patches, report = object_patches(model, taken=["blocks.0.self_attn.forward"])
    assert "blocks.0.self_attn.forward" not in patches
    assert report.left == {(ATTENTION, "hooks or other code replace its forward"): 1}
    block = model.blocks[1]
    block.forward = types.MethodType(lambda self, x, **kwargs: x, block)
    assert "blocks.1.forward" not in object_patches(model)[0]


@pytest.mark.parametrize("name", ["attn1_patch", "attn2_patch"])
@pytest.mark.parametrize("control", [False, True])
def test_patches_inside_of_attention_are_called(name, control):
    model, given = randomise(WanModel(control=control)), inputs()
    called = []
    options = {"patches": {name: [lambda given: called.append(1) or 2 * given["x"]]}}
    expected = run(model, given, **options)
    assert difference(run(model, given), expected) > 0.1
    talkingdit.accelerate(model)
    count = len(called)
    assert difference(run(model, given, **options), expected) < 1e-6
    assert len(called) == 2 * count


@pytest.mark.parametrize("place", ["self_attn.norm_q", "norm3"])
def test_norms_whose_weights_change_on_the_way_are_called(place):
    """A LoRA on a model that is only partly on the device."""
    model, given = randomise(WanModel()), inputs()
    plain = run(model, given)
    model.blocks[0].get_submodule(place).weight_function = [lambda weight: weight * weight]
    expected = run(model, given)
    assert difference(plain, expected) > 1e-3
    talkingdit.accelerate(model)
    assert difference(run(model, given), expected) < 1e-6


def test_another_attention_that_a_node_puts_in(monkeypatch):
    model, given = randomise(WanModel()), inputs()
    talkingdit.accelerate(model)
    before = run(model, given)
    monkeypatch.setattr(comfy_standin, "optimized_attention", lambda q, k, v, heads, transformer_options: 0 * q)
    assert difference(run(model, given), before) > 0.01


def test_what_is_not_known_is_said():
    model = randomise(WanModel(AudioBlock))
    patches, report = object_patches(model)
    assert set(patches) == {"blocks.0.self_attn.forward", "blocks.1.self_attn.forward"}
    assert report.left == {(BLOCK, "its forward is not the one that is known"): 2}
    with pytest.raises(ValueError, match="Wan transformer of ComfyUI, got Linear"):
        object_patches(torch.nn.Linear(2, 2))
