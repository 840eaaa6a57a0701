# SPDX-License-Identifier: Apache-2.0
"""Layers and models that compute in eight bits: against the products they stand for, and fused against unfused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkingdit import ops
from talkingdit.families import preset
from talkingdit.families.wan_s2v import blocks
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.model import WanS2VModel
from talkingdit.families.wan_s2v.units import UNITS
from talkingdit.nn import feed_forward
from talkingdit.nn.eight_bit import EightBitGelu, EightBitLinear, quantise
from talkingdit.nn.layers import GeluTanh
from talkingdit.ops.eight_bit import KINDS
from talkingdit.pipelines.memory import Memory, fit

kinds = pytest.mark.parametrize("kind", KINDS)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def tiny(dtype: torch.dtype = torch.float32) -> WanS2VModel:
    small: dict[str, Any] = {"dim": 64, "ffn_dim": 96, "audio_dim": 32, "num_heads": 2, "num_layers": 3}
    torch.manual_seed(3)
    model = WanS2VModel(**preset("puppet_tiny", **small, audio_inject_layers=(0, 2), zero_init=False))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.to(dtype).eval()


@torch.no_grad()
def velocity(model: WanS2VModel) -> Tensor:
    c, generator = model.config, torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    inputs = WanInputs(
        random(5, c.text_dim),
        reference=random(c.in_dim, 1, 8, 6),
        history=random(c.in_dim, 3, 8, 6),
        audio=random(c.audio_layers, c.audio_dim, 8),
    )
    latents = random(c.in_dim, 2, 8, 6)
    conditions = model.encode_conditions(inputs)
    return model(latents, torch.tensor([300.0, 800.0]), conditions)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_the_product_of_its_rounded_sides(kind: str, dtype: torch.dtype) -> None:
    plain = nn.Linear(48, 32).to(dtype)
    layer, x = EightBitLinear(plain, kind), torch.randn(2, 5, 48).to(dtype)
    weight, rows = ops.quantise_rows_reference(plain.weight.detach(), kind), ops.quantise_rows_reference(x, kind)
    want = F.linear(rows.wide().double(), weight.wide().double(), plain.bias.detach().double())
    got = layer(x)
    assert got.dtype == dtype
    assert relative(got, want) < torch.finfo(dtype).eps
    assert torch.equal(layer(ops.quantise_rows(x, kind)), got)
    assert relative(got, plain(x).detach()) < {"int8": 0.02, "fp8": 0.05}[kind]


def test_casting_a_model_leaves_codes_alone() -> None:
    layer = EightBitLinear(nn.Linear(16, 16), "fp8")
    before = layer.codes.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.codes, before)
    assert layer(torch.randn(3, 16).bfloat16()).dtype == torch.bfloat16


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_model_is_the_unfused_one_to_the_bit(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact: norms, gates and activations that round in the same pass change nothing in a model's result."""
    model = tiny(dtype)
    quantise(model, UNITS, kind)
    fused = velocity(model)
    plain = nn.Linear(1, 1)
    for name in ("norm_modulate", "gate_residual_norm_modulate"):
        op = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda layer, *given, op=op: op(plain, *given))
    for module in model.modules():
        if isinstance(module, nn.Sequential) and isinstance(module[1], EightBitGelu):
            module[1] = GeluTanh()
    assert torch.equal(velocity(model), fused)


@kinds
@pytest.mark.parametrize("contract", ["exact", "close"])
def test_a_model_stays_near_itself(kind: str, contract: str) -> None:
    model = tiny()
    want = velocity(model)
    layers = quantise(model, UNITS, kind, contract)
    assert {name.split(".")[0] for name in layers} == {"blocks", "audio_injector"}
    assert not any(name.endswith(("modulation", "norm")) for name in layers)
    assert not any(type(module) is nn.Linear for module in model.blocks.modules())
    assert 1e-4 < relative(velocity(model), want) < {"int8": 0.03, "fp8": 0.08}[kind]


def test_long_sequences_go_through_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    quantise(model, UNITS, "int8")
    want = velocity(model)
    monkeypatch.setattr(feed_forward, "FFN_TOKENS", 7)
    assert torch.equal(velocity(model), want)


def test_precision_goes_with_offloading_and_absorbed_audio() -> None:
    from talkingdit.families.wan_s2v import units

    want = None
    for words in ("precision=int8", "precision=int8,offload=block", "precision=int8,absorb_audio"):
        model = tiny()
        fit(model, Memory.parse(words), "cpu", units)
        got = velocity(model)
        want = got if want is None else want
        assert relative(got, want) < (1e-6 if "absorb" not in words else 0.05)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="quantise: kind must be one of int8, fp8, got 'int4'"):
        quantise(tiny(), UNITS, "int4")
    with pytest.raises(ValueError, match="quantise: the model has no plain linear layer in its large units"):
        quantise(nn.Sequential(nn.Linear(2, 2)), UNITS, "int8")
    with pytest.raises(ValueError, match="Memory: weights must be native where precision is fp8"):
        Memory.parse("precision=fp8,weights=int8")
    with pytest.raises(ValueError, match="Memory: precision must be one of native, fp8, int8, got 'int4'"):
        Memory.parse("precision=int4")
    layer = EightBitLinear(nn.Linear(4, 4), "int8")
    with pytest.raises(RuntimeError, match="rounding to eight bits has no gradient"):
        layer(torch.randn(2, 4, requires_grad=True))
