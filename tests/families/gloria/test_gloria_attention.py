# SPDX-License-Identifier: Apache-2.0
"""How much is looked at anchors, and what a step of the model costs: against known truth."""

import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from talkingdit import families, models
from talkingdit.families.gloria.attention import AnchorAttention
from talkingdit.families.wan_i2v.conditions import ExtraTokens, WanI2VInputs
from talkingdit.plan.clip import ClipShape

SIZES = dict(dim=192, ffn_dim=512, num_heads=4, num_layers=3, freq_dim=16, text_dim=12, text_len=24, image_dim=0)
SIZES |= dict(audio_inject_layers=(0, 2), audio_dim=8, audio_layers=3, audio_width=10)


def inputs(*sizes):
    """Of a clip of 3 latents of 8 x 12, with an anchor of each size."""
    extra = tuple(ExtraTokens(torch.randn(1, 16, 1, *size), [30.0 + i]) for i, size in enumerate(sizes))
    return WanI2VInputs(torch.randn(1, 24, 12), torch.randn(1, 20, 3, 8, 12), extra=extra)


def test_without_a_preference_an_anchor_is_looked_at_by_its_share_of_tokens():
    model = models.load("gloria_tiny", config=SIZES).requires_grad_(False)
    for block in model.blocks:
        block.self_attn.q.weight.zero_()
        block.self_attn.q.bias.zero_()
    given = inputs((8, 12), (4, 4))
    with AnchorAttention(model, types.SimpleNamespace(extra=given.extra)) as watched:
        model(torch.randn(1, 16, 3, 8, 12), torch.tensor([500.0]), given)
    tokens = 3 * 24 + 24 + 4
    expected = torch.tensor([24 / tokens, 4 / tokens])[:, None].expand(2, 3)
    torch.testing.assert_close(watched.weights, expected)
    assert all(not block.self_attn._forward_pre_hooks for block in model.blocks)


def test_a_step_costs_what_the_plan_says():
    # The counter knows the products of the plain kernel alone.
    model = models.load("gloria_tiny", config=SIZES | {"attention_backend": "math"}).requires_grad_(False)
    cost = families.get("gloria").cost
    config = cost.complete(dict(model.config))
    clip = ClipShape(height=64, width=96, latents=3)
    conditions = model.encode_conditions(inputs((8, 12)))
    assert cost.tokens(config, clip) == (72, len(conditions.layout))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        name: parameter.shape for name, parameter in cost.parameters(dict(SIZES | {"audio_width": 10})).items()
    }
    with FlopCounterMode(display=False) as counted:
        model(torch.randn(1, 16, 3, 8, 12), torch.tensor([500.0]), conditions)
    heard = 4 * 72 * 4 * 192 * 2  # audio attention, an op of ours that the counter does not know
    # The plan leaves out what does not grow with the tokens: the timestep's layers, keys and values of the audio.
    small = 2 * 2 * (16 * 192 + 192 * 192 + 6 * 192 * 192) + 2 * 2 * 2 * 12 * 10 * 192
    assert cost.flops(config, clip) == pytest.approx(counted.get_total_flops() - small + heard, rel=0.02)
