# SPDX-License-Identifier: Apache-2.0
"""Normalise, modulate, gate: against float64, for every dtype, grouping and shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import DTYPES, relative, with_gradients
from emulated_device import Device
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from talkingdit import ops

GROUPS: list[tuple[Any, int]] = [(7, 3), ([5, 5, 20], 3), ([20], 1), (None, 1)]  # the second has an empty group


def inputs_of(dtype: torch.dtype, count: int, dim: int = 37, tokens: int = 20, modulation: Any = None) -> list[Tensor]:
    x, y = torch.randn(2, tokens, dim) * 3 + 1, torch.randn(2, tokens, dim)
    gate, scale, shift = torch.randn(3, 2, count, dim)
    return [x.to(dtype), y.to(dtype), *(m.to(modulation or dtype) for m in (gate, scale, shift))]


def pairs_of(groups: Any) -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
    """(op, reference) as functions of x, y, gate, scale, shift."""
    return [
        (
            lambda x, y, gate, scale, shift: ops.norm_modulate(x, scale, shift, groups),
            lambda x, y, gate, scale, shift: ops.norm_modulate_reference(x, scale, shift, groups),
        ),
        (
            lambda x, y, gate, scale, shift: ops.gate_residual(x, y, gate, groups),
            lambda x, y, gate, scale, shift: ops.gate_residual_reference(x, y, gate, groups),
        ),
        (
            lambda *v: ops.gate_residual_norm_modulate(*v, groups),
            lambda *v: ops.gate_residual_norm_modulate_reference(*v, groups),
        ),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "count"), GROUPS, ids=str)
@pytest.mark.parametrize("which", range(3), ids=["norm", "gate", "fused"])
def test_error_is_at_most_twice_that_of_eager(dtype: torch.dtype, groups: Any, count: int, which: int) -> None:
    ours, eager = pairs_of(groups)[which]
    inputs = inputs_of(dtype, count)
    exact = with_gradients(eager, [v.double() for v in inputs])
    floor = torch.finfo(dtype).eps * (4 if dtype == torch.float64 else 0.25)
    for a, b, truth in zip(with_gradients(ours, inputs), with_gradients(eager, inputs), exact, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, truth) <= 2 * relative(b, truth) + floor


def test_a_few_huge_channels_do_not_cost_accuracy() -> None:
    """Residual streams have channels hundreds of deviations away; they must not cancel in the variance."""
    x = torch.randn(1, 64, 1536) + 50
    x[..., :3] += 4000
    scale, shift = torch.randn(2, 1, 1, 1536)
    exact = ops.norm_modulate_reference(x.double(), scale.double(), shift.double())
    ours, eager = ops.norm_modulate(x, scale, shift), ops.norm_modulate_reference(x, scale, shift)
    assert relative(ours, exact) <= 2 * relative(eager, exact)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [37, 100, 1536])
def test_gradients_of_a_float32_stream_with_16_bit_layers(half: torch.dtype, dim: int) -> None:
    x, y, gate, scale, shift = inputs_of(torch.float32, 2, dim, modulation=torch.float32)
    inputs = [x, y.to(half), gate, scale, shift]
    ours = with_gradients(lambda *v: ops.gate_residual_norm_modulate(*v, [9, 20], dtype=half), inputs)
    exact = with_gradients(
        lambda *v: ops.gate_residual_norm_modulate_reference(*v, [9, 20]), [v.double() for v in inputs]
    )
    assert [v.dtype for v in ours[-5:]] == [v.dtype for v in inputs]
    for a, truth in zip(ours, exact, strict=True):
        assert relative(a, truth) < torch.finfo(half).eps


def test_float32_stream_with_bfloat16_layers() -> None:
    """Residual stream and modulation in float32, results of layers and their inputs in bfloat16."""
    x, y, gate, scale, shift = inputs_of(torch.float32, 2, modulation=torch.float32)
    y = y.bfloat16()
    exact = ops.gate_residual_norm_modulate_reference(*(v.double() for v in (x, y, gate, scale, shift)), [9, 20])
    residual, modulated = ops.gate_residual_norm_modulate(x, y, gate, scale, shift, [9, 20], dtype=torch.bfloat16)
    assert residual.dtype == torch.float32
    assert modulated.dtype == torch.bfloat16
    assert relative(residual, exact[0]) < 1e-7
    assert relative(modulated, exact[1]) < 2.5e-3
    low = ops.norm_modulate(x.bfloat16(), scale, shift, [9, 20], dtype=torch.float32)
    assert (
        relative(low, ops.norm_modulate_reference(x.bfloat16().double(), scale.double(), shift.double(), [9, 20]))
        < 1e-6
    )


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 70),
    dim=st.integers(1, 70),
    per_group=st.integers(1, 30),
    data=st.data(),
)
def test_shards_equal_the_whole(tokens: int, dim: int, per_group: int, data: Any) -> None:
    count = -(-tokens // per_group)
    groups: Any = per_group
    if data.draw(st.booleans()):
        groups = sorted(data.draw(st.lists(st.integers(0, tokens), min_size=count - 1, max_size=count - 1))) + [tokens]
        if count > 128:
            groups = per_group
    x, y, gate, scale, shift = inputs_of(torch.float32, count, dim, tokens)
    whole = ops.gate_residual_norm_modulate(x, y, gate, scale, shift, groups)
    exact = ops.gate_residual_norm_modulate_reference(*(v.double() for v in (x, y, gate, scale, shift)), groups)
    for a, b in zip(whole, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    cut = data.draw(st.integers(0, tokens))
    wide = torch.zeros(2, tokens, 2, dim)
    wide[:, :, 0], wide[:, :, 1] = x, y  # strided token axis
    gradient = torch.zeros_like(gate)
    for begin, end in ((0, cut), (cut, tokens)):
        leaf = gate.clone().requires_grad_()
        shard = ops.gate_residual_norm_modulate(
            wide[:, begin:end, 0], wide[:, begin:end, 1], leaf, scale, shift, groups, token_offset=begin
        )
        for part, full in zip(shard, whole, strict=True):
            torch.testing.assert_close(part, full[:, begin:end], rtol=0, atol=0)
        gradient += torch.autograd.grad(shard[0].sum() + shard[1].square().sum(), leaf)[0]
    leaf = gate.clone().requires_grad_()
    full = ops.gate_residual_norm_modulate(x, y, leaf, scale, shift, groups)
    expected = torch.autograd.grad(full[0].sum() + full[1].square().sum(), leaf)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-3)


def test_out_receives_the_result_also_in_place() -> None:
    x, y, gate, scale, shift = inputs_of(torch.bfloat16, 3)
    expected = ops.gate_residual_norm_modulate(x, y, gate, scale, shift, 7)
    assert torch.equal(
        ops.norm_modulate(x, scale, shift, 7, out=torch.empty_like(x)), ops.norm_modulate(x, scale, shift, 7)
    )
    stream, modulated = x.clone(), torch.empty_like(x)
    ops.gate_residual_norm_modulate(stream, y, gate, scale, shift, 7, out=(stream, modulated))
    assert torch.equal(stream, expected[0])
    assert torch.equal(modulated, expected[1])
    assert torch.equal(ops.gate_residual(x, y, gate, 7, out=x), expected[0])


def test_large_results_are_right_too() -> None:
    """Beyond the size of the last cache results are written past it."""
    x, scale, shift = torch.randn(1, 6240, 1536), torch.randn(1, 4, 1536), torch.randn(1, 4, 1536)
    y = ops.norm_modulate(x, scale, shift, 1560)[:, 4000:4100]
    expected = ops.norm_modulate_reference(x[:, 4000:4100], scale, shift, 1560, token_offset=4000)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("groups", "count"), GROUPS[:2], ids=str)
@pytest.mark.parametrize("which", range(3), ids=["norm", "gate", "fused"])
def test_gradcheck(groups: Any, count: int, which: int) -> None:
    inputs = [v.requires_grad_() for v in inputs_of(torch.float64, count, dim=5)]
    assert torch.autograd.gradcheck(pairs_of(groups)[which][0], inputs, fast_mode=True)


def test_broadcast_modulation_collects_the_gradient_of_the_batch() -> None:
    x, *_ = inputs_of(torch.float32, 1)
    scale, shift = (torch.randn(1, 1, 37, requires_grad=True) for _ in range(2))
    grads = [
        torch.autograd.grad(function(x, scale, shift).square().sum(), (scale, shift))
        for function in (ops.norm_modulate, ops.norm_modulate_reference)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, y, gate, scale, shift = inputs_of(dtype, 3, modulation=torch.float32)
    place, library = (7, [], 0), torch.ops.talkingdit
    leaves = [v.clone().requires_grad_() for v in (x, y, gate, scale, shift)]
    norm = (leaves[0], leaves[3], leaves[4], *place, 1e-6, torch.float32)
    torch.library.opcheck(library.norm_modulate.default, norm)
    torch.library.opcheck(library.gate_residual.default, (*leaves[:3], *place))
    torch.library.opcheck(library.gate_residual_norm_modulate.default, (*leaves, *place, 1e-6, dtype))
    torch.library.opcheck(library.norm_modulate_out.default, (x, scale, shift, *place, 1e-6, torch.empty_like(x)))
    torch.library.opcheck(library.norm_modulate_backward.default, (x, x, scale, *place, 1e-6))
    torch.library.opcheck(library.gate_residual_backward.default, (x, y, gate, *place))


def test_compiles_into_one_graph_with_dynamic_shapes() -> None:
    def block(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, frame: int, offset: int) -> Tensor:
        x, h = ops.gate_residual_norm_modulate(x, y, gate, scale, shift, frame, token_offset=offset)
        return ops.norm_modulate(ops.gate_residual(x, h, gate, frame, offset), scale, shift, frame, token_offset=offset)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, frame, offset in ((20, 7, 0), (12, 9, 3), (31, 20, 5)):
        inputs = inputs_of(torch.float32, 4, tokens=tokens)
        results = [
            with_gradients(lambda *v, f=f, frame=frame, offset=offset: f(*v, frame, offset), inputs)
            for f in (block, compiled)
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_same_bits_whatever_the_number_of_threads() -> None:
    inputs = inputs_of(torch.float32, 3, dim=512, tokens=600)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(with_gradients(lambda *v: ops.gate_residual_norm_modulate(*v, [100, 350, 600]), inputs))
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_errors_say_what_is_wrong() -> None:
    x, y, gate, scale, shift = inputs_of(torch.float32, 3)
    with pytest.raises(
        ValueError, match=r"norm_modulate: x must have 3 dimensions \[B, N, dim\], got shape \(20, 37\)"
    ):
        ops.norm_modulate(x[0], scale, shift, 7)
    with pytest.raises(ValueError, match=r"norm_modulate: shift must have shape \[B, G, dim\] = \(2, 3, 37\), got"):
        ops.norm_modulate(x, scale, shift[:, :2], 7)
    with pytest.raises(ValueError, match="tokens must lie inside the groups, which end at 18, got tokens 0 to 20"):
        ops.norm_modulate(x, scale, shift, 6)
    with pytest.raises(ValueError, match="2 groups need 2 rows of modulation, got 3"):
        ops.norm_modulate(x, scale, shift, [5, 20])
    with pytest.raises(ValueError, match="token indices that do not decrease"):
        ops.norm_modulate(x, scale, shift, [9, 5, 20])
    with pytest.raises(ValueError, match="groups must be a positive number of tokens"):
        ops.norm_modulate(x, scale, shift, 0)
    with pytest.raises(TypeError, match="x and y must both be float64 or neither"):
        ops.gate_residual(x, y.double(), gate, 7)
    with pytest.raises(TypeError, match="float64 only for float64 x"):
        ops.norm_modulate(x, scale, shift, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"out must be torch.float32 of shape \(2, 20, 37\), got"):
        ops.gate_residual(x, y, gate, 7, out=torch.empty(2, 20, 36))
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        ops.gate_residual(x.requires_grad_(), y, gate, 7, out=torch.empty(2, 20, 37))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "count"), [(4, 4), ([3, 3, 20], 3), (None, 1)], ids=str)
@pytest.mark.parametrize("dim", [64, 37, 520])
@pytest.mark.parametrize("which", ["norm", "gate", "both"])
def test_emulated_cuda_kernels(
    device: Device, dtype: torch.dtype, groups: Any, count: int, dim: int, which: str
) -> None:
    x, y, gate, scale, shift = inputs_of(dtype, count, dim, tokens=13)
    offset = 0 if groups is None else 2
    name, inputs = {
        "norm": ("norm_modulate", [x, scale, shift]),
        "gate": ("gate_residual", [x, y, gate]),
        "both": ("gate_residual_norm_modulate", [x, y, gate, scale, shift]),
    }[which]
    device.compare(
        lambda *v: getattr(ops, name)(*v, groups, token_offset=offset),
        lambda *v: getattr(ops, f"{name}_reference")(*v, groups, token_offset=offset),
        inputs,
    )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 1288])
@pytest.mark.parametrize("which", ["norm", "gate", "both"])
def test_emulated_cuda_kernels_of_a_float32_stream(device: Device, half: torch.dtype, dim: int, which: str) -> None:
    x, y, gate, scale, shift = inputs_of(torch.float32, 5, dim, tokens=19)
    groups, y = [3, 10, 10, 11, 24], y.to(half)
    name, inputs, kwargs = {
        "norm": ("norm_modulate", [x, scale, shift], {"dtype": half}),
        "gate": ("gate_residual", [x, y, gate], {}),
        "both": ("gate_residual_norm_modulate", [x, y, gate, scale, shift], {"dtype": half}),
    }[which]
    device.compare(
        lambda *v: getattr(ops, name)(*v, groups, token_offset=5, **kwargs),
        lambda *v: getattr(ops, f"{name}_reference")(*v, groups, token_offset=5),
        inputs,
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "count"), GROUPS, ids=str)
@pytest.mark.parametrize("which", range(3), ids=["norm", "gate", "fused"])
def test_cuda_agrees_with_cpu(dtype: torch.dtype, groups: Any, count: int, which: int) -> None:
    ours, _ = pairs_of(groups)[which]
    inputs = inputs_of(dtype, count)
    expected = with_gradients(ours, inputs)
    on_device = with_gradients(ours, [v.cuda() for v in inputs])
    for a, b in zip(on_device, expected, strict=True):
        assert relative(a.cpu(), b) < 4 * torch.finfo(dtype).eps
