# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and rotation in one pass, against float64; what a rotation is, tests of rope3d say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPES, relative, with_gradients
from emulated_device import Device
from hypothesis import given, settings
from hypothesis import strategies as st
from rope_layouts import HEADS, make_layout, small_layout
from torch import Tensor

from talkingdit import ops
from talkingdit.nn.layers import RMSNorm
from talkingdit.ops import RopeLayout, Segment
from talkingdit.ops.qk_norm_rope3d import rms_norm

NORMS = ["all_heads", "per_head"]


def qk_inputs(dtype: torch.dtype, norm: str, tokens: int, dim: int = 20) -> list[Tensor]:
    q, k = torch.randn(2, tokens, 3, dim), torch.randn(2, tokens, 2, dim)
    weights = [torch.randn(x.shape[2] * dim if norm == "all_heads" else dim) for x in (q, k)]
    return [v.to(dtype) for v in (q, k, *weights)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("norm", NORMS)
def test_error_is_at_most_twice_that_of_eager(dtype: torch.dtype, pairing: str, norm: str) -> None:
    layout = make_layout(pairing)
    inputs = qk_inputs(dtype, norm, len(layout))

    def ours(*v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.qk_norm_rope3d(*v, layout, norm=norm)

    def eager(*v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.qk_norm_rope3d_reference(*v, layout, norm=norm)

    exact = with_gradients(eager, [v.double() for v in inputs])
    floor = 4 * torch.finfo(dtype).eps if dtype == torch.float64 else 0.0
    for a, b, truth in zip(with_gradients(ours, inputs), with_gradients(eager, inputs), exact, strict=True):
        assert relative(a, truth) <= 2 * relative(b, truth) + floor


@settings(max_examples=40, deadline=None)
@given(frames=st.integers(1, 6), pairs=st.integers(1, 20), heads=st.integers(1, 3), half=st.booleans(), data=st.data())
def test_shards_and_strides_change_nothing(
    frames: int, pairs: int, heads: int, half: bool, data: st.DataObject
) -> None:
    layout = RopeLayout(
        [Segment(range(frames), range(2), range(3))], (2 * pairs, 0, 0), pairing="half" if half else "interleaved"
    )
    wide = torch.randn(2, len(layout), 3, heads, 2 * pairs + 5)
    x = wide[:, :, 1, :, : 2 * pairs].transpose(1, 2).contiguous().transpose(1, 2)  # heads before tokens in memory
    weight = torch.randn(heads * 2 * pairs)
    whole = ops.qk_norm_rope3d(x, wide[:, :, 1, :, : 2 * pairs], weight, weight, layout)
    torch.testing.assert_close(whole[0], whole[1], rtol=0, atol=0)
    cut = data.draw(st.integers(0, len(layout)))
    part = ops.qk_norm_rope3d(x[:, cut:], x[:, cut:], weight, weight, layout, token_offset=cut)[0]
    torch.testing.assert_close(part, whole[0][:, cut:], rtol=0, atol=0)


def test_out_receives_the_result_also_in_place() -> None:
    layout = make_layout("half")
    x, weight = torch.randn(2, len(layout), 3, 20, dtype=torch.bfloat16), torch.randn(60)
    expected_q, expected_k = ops.qk_norm_rope3d(x, x, weight, weight, layout)
    q, k = x.clone(), x.clone()
    ops.qk_norm_rope3d(q, k, weight, weight, layout, out=(q, k))
    assert torch.equal(q, expected_q)
    assert torch.equal(k, expected_k)


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm: str) -> None:
    layout = make_layout(split=(2, 4, 2))
    inputs = [v.requires_grad_() for v in qk_inputs(torch.float64, norm, len(layout), 8)]
    assert torch.autograd.gradcheck(lambda *v: ops.qk_norm_rope3d(*v, layout, norm=norm), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    """Registered is the op on one tensor, q or k."""
    layout = make_layout()
    x = torch.randn(2, len(layout), 3, 20, dtype=dtype, requires_grad=True)
    weight = torch.randn(60, requires_grad=True)
    table, segments = layout.tables(x.device, x.dtype)
    options = (table, segments, layout.pairs, True, 0, False, 1e-6)
    plain, plain_weight = x.detach(), weight.detach()
    torch.library.opcheck(torch.ops.talkingdit.qk_norm_rope3d.default, (x, weight, *options))
    torch.library.opcheck(torch.ops.talkingdit.qk_norm_rope3d_backward.default, (plain, plain, plain_weight, *options))


def test_compiles_into_one_graph_with_dynamic_shapes() -> None:
    layout = make_layout()

    def model(q: Tensor, weight: Tensor, offset: int) -> Tensor:
        a, b = ops.qk_norm_rope3d(q * 2, q, weight, weight, layout, token_offset=offset)
        return ops.rope3d(a, layout, token_offset=offset) + b

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, begin, end in ((1, 0, len(layout)), (2, 3, 20), (3, 7, 11)):
        q = torch.randn(batch, end - begin, 3, 20, requires_grad=True)
        weight = torch.randn(60, requires_grad=True)
        grads = []
        for function in (model, compiled):
            result = function(q, weight, begin)
            grads.append((result, *torch.autograd.grad(result.square().sum(), (q, weight))))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_same_bits_whenever_it_runs() -> None:
    layout = RopeLayout([Segment(range(8), range(10), range(10))], (8, 6, 6))
    inputs = qk_inputs(torch.float32, "all_heads", len(layout))
    runs = [with_gradients(lambda *v: ops.qk_norm_rope3d(*v, layout), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_tokens_are_no_problem() -> None:
    layout = make_layout()
    x, weight = torch.empty(2, 0, 3, 20, requires_grad=True), torch.randn(60, requires_grad=True)
    q, _ = ops.qk_norm_rope3d(x, x, weight, weight, layout)
    q.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_errors_say_what_is_wrong() -> None:
    layout = make_layout()
    x, weight = torch.randn(1, len(layout), 2, 20), torch.ones(20)
    with pytest.raises(ValueError, match=r"q_weight must have shape \[H\*D\] = \(40,\), got \(20,\)"):
        ops.qk_norm_rope3d(x, x, weight, weight, layout)
    with pytest.raises(ValueError, match="norm must be 'all_heads' or 'per_head', got 'rows'"):
        ops.qk_norm_rope3d(x, x, weight, weight, layout, norm="rows")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("heads", "split", "pairing"), HEADS)
def test_emulated_cuda_kernels(
    device: Device, dtype: torch.dtype, norm: str, heads: int, split: tuple[int, int, int], pairing: str
) -> None:
    layout, dim = small_layout(split, pairing), sum(split)
    q, k = torch.randn(2, 2, 9, heads, dim).to(dtype).unbind(0)
    weights = [1 + torch.randn(dim if norm == "per_head" else heads * dim).to(dtype) for _ in range(2)]
    options = {"norm": norm, "token_offset": 11, "eps": 1e-5}
    device.compare(
        lambda *v: ops.qk_norm_rope3d(*v, layout, **options),
        lambda *v: ops.qk_norm_rope3d_reference(*v, layout, **options),
        [q, k, *weights],
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("norm", NORMS)
def test_cuda_agrees_with_cpu(dtype: torch.dtype, pairing: str, norm: str) -> None:
    layout = make_layout(pairing)
    inputs = qk_inputs(dtype, norm, len(layout))
    expected = with_gradients(lambda *v: ops.qk_norm_rope3d(*v, layout, norm=norm), inputs)
    on_device = with_gradients(
        lambda *v: tuple(o.cpu() for o in ops.qk_norm_rope3d(*(t.cuda() for t in v), layout, norm=norm)), inputs
    )
    for a, b in zip(on_device, expected, strict=True):
        assert relative(a, b) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [2, 6, 128, 1030, 2046, 5120])
def test_norm_alone_has_at_most_twice_the_error_of_torch(channels: int, dtype: torch.dtype) -> None:
    """The norm of cross-attention's queries and keys on processors; weights may have another dtype than activations."""
    x, weight = 3 * torch.randn(2, 37, channels), torch.randn(channels)

    def composite(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), 1e-6).to(x.dtype),)

    inputs = [x.to(dtype), weight.to(dtype)]
    exact = with_gradients(composite, [v.double() for v in inputs])
    ours = with_gradients(lambda x, weight: (rms_norm(x, weight, 1e-6),), inputs)
    floor = 4 * torch.finfo(dtype).eps if dtype == torch.float64 else 0.0
    for a, b, truth in zip(ours, with_gradients(composite, inputs), exact, strict=True):
        assert relative(a, truth) <= 2 * relative(b, truth) + floor
    layer = RMSNorm(channels)
    layer.weight.data = weight
    torch.testing.assert_close(layer(x.to(dtype)), rms_norm(x.to(dtype), weight), rtol=0, atol=0)
    swapped = x.to(dtype).transpose(0, 1)
    torch.testing.assert_close(layer(swapped), layer(x.to(dtype)).transpose(0, 1), rtol=0, atol=0)


def test_norm_alone_takes_no_rows_and_refuses_odd_channels() -> None:
    assert rms_norm(torch.empty(0, 4), torch.ones(4)).shape == (0, 4)
    with pytest.raises(ValueError, match=r"rms_norm: x must have an even number of channels, got shape \(2, 3\)"):
        rms_norm(torch.zeros(2, 3), torch.ones(3))
    x = torch.randn(2, 3)
    torch.testing.assert_close(RMSNorm(3)(x), F.rms_norm(x, (3,), eps=1e-6))
