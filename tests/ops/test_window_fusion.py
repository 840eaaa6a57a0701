# SPDX-License-Identifier: Apache-2.0
"""window_fusion and fused_window_step against float64 references and against sums written out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from emulated_device import Device
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from talkingdit import ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STARTS = [0, 3, 6, -2]


def by_hand(windows: Tensor, starts: Sequence[int], weights: Tensor, length: int) -> Tensor:
    """The definition in float64, one frame of one window at a time."""
    total = torch.zeros(length, dtype=torch.float64)
    out = torch.zeros(windows.shape[1], length, *windows.shape[3:], dtype=torch.float64)
    for i, start in enumerate(starts):
        for j in range(windows.shape[2]):
            out[:, (start + j) % length] += weights[i, j] * windows[i, :, j].double()
            total[(start + j) % length] += weights[i, j]
    return out / total[:, None, None]


def step_by_hand(
    x: Tensor, predictions: Sequence[Tensor], rates: Tensor, starts: Sequence[int], weights: Tensor
) -> Tensor:
    n, _, f, _, _ = predictions[0].shape
    rows = rates.double().expand(n, -1)
    updated = torch.zeros(predictions[0].shape, dtype=torch.float64)
    for i, start in enumerate(starts):
        for j in range(f):
            updated[i, :, j] = rows[i, 0] * x[:, (start + j) % x.shape[1]].double()
        for k, prediction in enumerate(predictions):
            updated[i] += rows[i, 1 + k] * prediction[i].double()
    return by_hand(updated, starts, weights, x.shape[1])


def rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def tables(n: int = 4, f: int = 5) -> Tensor:
    return torch.rand(n, f, dtype=torch.float64) + 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_fusion_is_as_accurate_as_eager(dtype: torch.dtype) -> None:
    windows, weights = torch.randn(4, 3, 5, 6, 7).to(dtype), tables()
    true = by_hand(windows, STARTS, weights, 9)
    error = rms(ops.window_fusion(windows, STARTS, weights, 9) - true)
    eager = rms(ops.window_fusion_reference(windows, STARTS, weights, 9) - true)
    assert error <= 2 * eager + 1e-15
    assert error <= {torch.float64: 1e-15, torch.float32: 1e-7}.get(dtype, 1e-2) * rms(true)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_step_is_as_accurate_as_eager(x_dtype: torch.dtype, dtype: torch.dtype, count: int) -> None:
    x, weights = torch.randn(3, 9, 6, 7).to(x_dtype), tables()
    predictions = [torch.randn(4, 3, 5, 6, 7).to(dtype) for _ in range(count)]
    for rates in (torch.randn(1 + count, dtype=torch.float64), torch.randn(4, 1 + count, dtype=torch.float64)):
        true = step_by_hand(x, predictions, rates, STARTS, weights)
        result = ops.fused_window_step(x, predictions, rates, STARTS, weights)
        assert result.dtype == x_dtype
        eager = rms(ops.fused_window_step_reference(x, predictions, rates, STARTS, weights) - true)
        assert rms(result - true) <= 2 * eager + 1e-15
        assert rms(result - true) <= {torch.float64: 1e-14, torch.float32: 1e-6}.get(x_dtype, 1e-2) * rms(true)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_size_any_start(data: st.DataObject) -> None:
    size = st.integers(1, 5)
    n, c, h, length = (data.draw(size) for _ in range(4))
    f, w = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    starts = data.draw(st.lists(st.integers(-40, 40), min_size=n, max_size=n))
    starts[0] = 0
    windows = torch.randn(n, c, max(f, length), h, w)
    weights = tables(*windows.shape[0:3:2])
    result = ops.window_fusion(windows, starts, weights, length)
    torch.testing.assert_close(result.double(), by_hand(windows, starts, weights, length), rtol=1e-5, atol=1e-5)


def test_a_window_longer_than_the_video_counts_repeated_frames_repeatedly() -> None:
    windows = torch.arange(5.0).view(1, 1, 5, 1, 1)
    result = ops.window_fusion(windows, [0], ops.counter_weights(1, 5), 3)
    assert result.flatten().tolist() == [1.5, 2.5, 2.0]  # slots 0 and 3, 1 and 4, 2


def test_a_frame_that_one_window_covers_is_copied_exactly() -> None:
    windows = torch.randn(2, 3, 4, 5, 16)
    result = ops.window_fusion(windows, [0, 4], torch.full((2, 4), 0.3), 8)
    assert torch.equal(result, torch.cat(list(windows), dim=1))


def test_slots_without_weight_are_not_read() -> None:
    windows = torch.ones(2, 1, 4, 2, 9)
    windows[1, :, 2:] = float("nan")
    weights = torch.ones(2, 4)
    weights[1, 2:] = 0
    assert torch.equal(ops.window_fusion(windows, [0, 2], weights, 4), torch.ones(1, 4, 2, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_take_the_streaming_path(dtype: torch.dtype) -> None:
    channels = 8 // dtype.itemsize  # results of 21 MB
    windows, weights = torch.randn(2, channels, 12, 256, 512).to(dtype), tables(2, 12)
    predictions, x = [windows], torch.randn(channels, 20, 256, 512).to(dtype)
    true = by_hand(windows, [0, 8], weights, 20)
    assert rms(ops.window_fusion(windows, [0, 8], weights, 20) - true) <= 5e-3 * rms(true)
    rates = torch.tensor([1.0, -0.5])
    true = step_by_hand(x, predictions, rates, [0, 8], weights)
    assert rms(ops.fused_window_step(x, predictions, rates, [0, 8], weights) - true) <= 5e-3 * rms(true)


def strided(shape: Sequence[int], kind: str) -> Tensor:
    if kind == "channels last of a batch":
        return torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    if kind == "cropped planes":
        return torch.randn(*shape[:-2], shape[-2] + 3, shape[-1] + 5)[..., 1:-2, 2:-3]
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


@pytest.mark.parametrize("kind", ["channels last of a batch", "cropped planes", "last axis strided"])
def test_strided_inputs(kind: str) -> None:
    windows, x, weights = strided((4, 3, 5, 6, 37), kind), strided((3, 9, 6, 37), kind), tables()
    assert torch.equal(
        ops.window_fusion(windows, STARTS, weights, 9), ops.window_fusion(windows.contiguous(), STARTS, weights, 9)
    )
    other = torch.randn(4, 3, 5, 6, 37)
    assert torch.equal(
        ops.fused_window_step(x, [windows, other], [1, 2, 3], STARTS, weights),
        ops.fused_window_step(x.contiguous(), [windows.contiguous(), other], [1, 2, 3], STARTS, weights),
    )
    out = torch.zeros(9, 3, 6, 37).transpose(0, 1)
    ops.window_fusion(windows, STARTS, weights, 9, out=out)
    assert torch.equal(out, ops.window_fusion(windows, STARTS, weights, 9))


def test_tables_may_be_lists_or_tensors_of_any_kind() -> None:
    windows, weights = torch.randn(2, 3, 4, 5, 6), torch.rand(2, 4) + 0.1
    expected = ops.window_fusion(windows, [0, 2], weights.double(), 6)
    assert torch.equal(
        ops.window_fusion(windows, torch.tensor([0, 2], dtype=torch.int32), weights.tolist(), 6), expected
    )
    assert torch.equal(ops.window_fusion(windows, (-6, 8), weights, 6), expected)
    x, predictions = torch.randn(3, 6, 5, 6), torch.randn(2, 2, 3, 4, 5, 6)
    assert torch.equal(
        ops.fused_window_step(x, predictions, (1, 0.5, 2), [0, 2], weights),
        ops.fused_window_step(x, list(predictions), torch.tensor([[1, 0.5, 2]] * 2), [0, 2], weights),
    )


def test_out_is_filled_and_may_be_the_latents() -> None:
    x, predictions, weights = torch.randn(3, 9, 6, 7), [torch.randn(4, 3, 5, 6, 7)], tables()
    expected = ops.fused_window_step(x, predictions, [1, -0.2], STARTS, weights)
    assert ops.fused_window_step(x, predictions, [1, -0.2], STARTS, weights, out=x) is x
    assert torch.equal(x, expected)


def test_empty_planes() -> None:
    assert ops.window_fusion(torch.zeros(2, 3, 4, 0, 6), [0, 2], torch.ones(2, 4), 6).shape == (3, 6, 0, 6)


def test_same_bits_every_time_and_for_every_number_of_threads() -> None:
    windows, weights = torch.randn(4, 16, 5, 60, 52, dtype=torch.bfloat16), tables()
    first = ops.window_fusion(windows, STARTS, weights, 9)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            assert torch.equal(ops.window_fusion(windows, STARTS, weights, 9), first)
    finally:
        torch.set_num_threads(threads)


# ---- gradients -------------------------------------------------------------------------------------------------------
def test_gradients_of_fusion() -> None:
    windows = torch.randn(4, 2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = tables()
    weights[3, 4] = 0
    fuse = lambda w: ops.window_fusion(w, STARTS, weights, 9)  # noqa: E731
    assert torch.autograd.gradcheck(fuse, windows)
    assert torch.autograd.gradgradcheck(fuse, windows)


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_gradients_of_step(need: tuple[bool, bool]) -> None:
    x = torch.randn(2, 9, 2, 3, dtype=torch.float64, requires_grad=need[0])
    predictions = [torch.randn(4, 2, 5, 2, 3, dtype=torch.float64, requires_grad=need[1]) for _ in range(3)]
    rates, weights = torch.randn(4, 4, dtype=torch.float64), tables()
    assert torch.autograd.gradcheck(
        lambda x, *p: ops.fused_window_step(x, p, rates, STARTS, weights), (x, *predictions)
    )


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gradients_are_as_accurate_as_eager(dtype: torch.dtype) -> None:
    x, weights = torch.randn(3, 9, 6, 7).to(dtype), tables()
    inputs = [x, *(torch.randn(4, 3, 5, 6, 7).to(dtype) for _ in range(2))]
    grad = torch.randn(3, 9, 6, 7).to(dtype)

    def grads(op, to: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [t.to(to).requires_grad_() for t in inputs]
        return list(torch.autograd.grad(op(leaves[0], leaves[1:], [1, 2, -1.5], STARTS, weights), leaves, grad.to(to)))

    true = grads(ops.fused_window_step_reference, torch.float64)
    ours, eager = grads(ops.fused_window_step, dtype), grads(ops.fused_window_step_reference, dtype)
    for t, o, e in zip(true, ours, eager, strict=True):
        assert o.dtype == dtype
        assert rms(o - t) <= 2 * rms(e - t) + 1e-7 * rms(t)


def test_half_predictions_get_half_gradients() -> None:
    x = torch.randn(3, 9, 6, 7, requires_grad=True)
    prediction = torch.randn(4, 3, 5, 6, 7, dtype=torch.bfloat16, requires_grad=True)
    ops.fused_window_step(x, [prediction], [1, 2], STARTS, tables()).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert prediction.grad is not None
    assert prediction.grad.dtype == torch.bfloat16


# ---- the framework ---------------------------------------------------------------------------------------------------
def test_opcheck() -> None:
    starts, weights = torch.tensor(STARTS), tables()
    windows = torch.randn(4, 2, 5, 2, 3, requires_grad=True)
    library = torch.ops.talkingdit
    torch.library.opcheck(library.window_fusion, (windows, starts, weights, 9))
    torch.library.opcheck(library.window_fusion_out, (windows.detach(), starts, weights, torch.empty(2, 9, 2, 3)))
    torch.library.opcheck(library.window_fusion_backward, (torch.randn(2, 9, 2, 3), starts, weights))
    x, rates = torch.randn(2, 9, 2, 3, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    pair = [windows, torch.randn(4, 2, 5, 2, 3, requires_grad=True)]
    torch.library.opcheck(library.fused_window_step, (x, pair, rates, starts, weights))
    plain = (x.detach(), [p.detach() for p in pair], rates, starts, weights)
    torch.library.opcheck(library.fused_window_step_out, (*plain, torch.empty(2, 9, 2, 3)))
    gradient = (torch.randn(2, 9, 2, 3), rates, starts, weights, torch.bfloat16, [True, True])
    torch.library.opcheck(library.fused_window_step_backward, gradient)


def test_compiles_into_one_graph() -> None:
    windows = torch.randn(4, 2, 5, 2, 3, requires_grad=True)
    x, weights = torch.randn(2, 9, 2, 3, requires_grad=True), tables()

    def loss(x: Tensor, windows: Tensor, starts: list[int] | Tensor, weights: Tensor) -> Tensor:
        z = ops.fused_window_step(x, [windows, 2 * windows], [1.0, 0.5, -0.25], starts, weights)
        return (z * ops.window_fusion(windows, starts, weights, 9)).sum()

    expected = torch.autograd.grad(loss(x, windows, STARTS, weights), (x, windows))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for starts in (STARTS, torch.tensor(STARTS)):
        result = torch.autograd.grad(compiled(x, windows, starts, weights), (x, windows))
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(4, 6), (3, 5), (2, 8)])
def test_emulated_cuda_kernels_of_fusion(device: Device, dtype: torch.dtype, size: tuple[int, int]) -> None:
    windows, starts = torch.randn(3, 2, 5, *size).to(dtype), [0, 3, 6]
    weights = torch.rand(3, 5, dtype=torch.float64) + 0.1
    device.compare(
        lambda w: ops.window_fusion(w, starts, weights, 9),
        lambda w: ops.window_fusion_reference(w, starts, weights, 9),
        [windows],
    )


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
def test_emulated_cuda_kernels_of_step(
    device: Device, dtypes: tuple[torch.dtype, torch.dtype], size: tuple[int, int]
) -> None:
    x, predictions = (
        torch.randn(2, 9, *size).to(dtypes[0]),
        [torch.randn(3, 2, 5, *size).to(dtypes[1]) for _ in range(3)],
    )
    weights, starts = torch.rand(3, 5, dtype=torch.float64) + 0.1, [0, 5, 7]  # the last one wraps
    coefficients = torch.randn(3, 4, dtype=torch.float64)
    weights[1, 2] = 0
    device.compare(
        lambda x, *p: ops.fused_window_step(x, list(p), coefficients, starts, weights),
        lambda x, *p: ops.fused_window_step_reference(x, list(p), coefficients, starts, weights),
        [x, *predictions],
    )


@pytest.mark.parametrize(("length", "size"), [(300, (1, 3)), (3, (20, 32))], ids=["few cover a frame", "all cover it"])
def test_emulated_cuda_kernels_of_very_many_windows(device: Device, length: int, size: tuple[int, int]) -> None:
    count = 700  # more than shared memory holds: those of a frame fit, or come in turns to each of several tiles
    windows, x = torch.randn(count, 2, 2, *size), torch.randn(2, length, *size)
    starts, weights = [7 * i - 90 for i in range(count)], torch.rand(count, 2, dtype=torch.float64) + 0.1
    device.compare(
        lambda x, w: ops.fused_window_step(x, [w], [0.5, 2.0], starts, weights),
        lambda x, w: ops.fused_window_step_reference(x, [w], [0.5, 2.0], starts, weights),
        [x, windows],
    )


@pytest.mark.cuda
def test_cuda_agrees_with_cpu() -> None:
    for dtype in DTYPES:
        for width in (7, 64):
            windows, x, weights = torch.randn(4, 3, 5, 6, width), torch.randn(3, 9, 6, width), tables()
            both = []
            for device in ("cpu", "cuda"):
                w, y = (t.to(device, dtype).requires_grad_() for t in (windows, x))
                z = ops.fused_window_step(y, [w, w * 2], [1, 0.5, -0.25], STARTS, weights)
                z = z + ops.window_fusion(w, STARTS, weights, 9)
                both.append([t.cpu() for t in (z, *torch.autograd.grad(z.sum(), (w, y)))])
            torch.testing.assert_close(*both)


@pytest.mark.cuda
def test_cuda_graph_sees_new_inputs_and_tables() -> None:
    windows, weights = torch.randn(2, 3, 4, 5, 8, device="cuda"), torch.ones(2, 4, device="cuda", dtype=torch.float64)
    starts = torch.tensor([0, 2], device="cuda")
    out = torch.empty(3, 6, 5, 8, device="cuda")
    ops.window_fusion(windows, starts, weights, 6, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.window_fusion(windows, starts, weights, 6, out=out)
    windows.normal_()
    starts.copy_(torch.tensor([-1, 3]))
    graph.replay()
    torch.testing.assert_close(out, ops.window_fusion(windows, [-1, 3], weights, 6))


# ---- errors ----------------------------------------------------------------------------------------------------------
def test_errors_name_the_argument() -> None:
    windows, weights = torch.randn(2, 3, 4, 5, 6), torch.ones(2, 4)
    fuse = ops.window_fusion
    with pytest.raises(ValueError, match=r"window_fusion: windows must have 5 dimensions \[n, C, f, H, W\], got"):
        fuse(windows[0], [0, 2], weights, 6)
    with pytest.raises(TypeError, match=r"window_fusion: windows must be float32.* got torch.int64"):
        fuse(windows.long(), [0, 2], weights, 6)
    with pytest.raises(ValueError, match=r"window_fusion: starts must have shape \[n\] = \(2,\), got \(3,\)"):
        fuse(windows, [0, 2, 4], weights, 6)
    with pytest.raises(TypeError, match=r"window_fusion: starts must be integers, got torch.float32"):
        fuse(windows, torch.tensor([0.0, 2.0]), weights, 6)
    with pytest.raises(ValueError, match=r"window_fusion: weights must have shape \[n, f\] = \(2, 4\), got \(2, 5\)"):
        fuse(windows, [0, 2], torch.ones(2, 5), 6)
    with pytest.raises(ValueError, match=r"window_fusion: weights must not require a gradient"):
        fuse(windows, [0, 2], weights.clone().requires_grad_(), 6)
    with pytest.raises(ValueError, match=r"window_fusion: length must be at least 1, got 0"):
        fuse(windows, [0, 2], weights, 0)
    with pytest.raises(ValueError, match=r"finite total other than 0, got 0 for frame 6 of 8"):
        fuse(windows, [0, 2], weights, 8)
    with pytest.raises(ValueError, match=r"finite total other than 0, got nan for frame 0 of 6"):
        fuse(windows, [0, 2], weights * float("nan"), 6)
    with pytest.raises(ValueError, match=r"window_fusion: out must be torch.float32 of shape \(3, 6, 5, 6\), got"):
        fuse(windows, [0, 2], weights, 6, out=torch.empty(3, 7, 5, 6))
    with pytest.raises(RuntimeError, match=r"window_fusion: out= has no gradient"):
        fuse(windows.clone().requires_grad_(), [0, 2], weights, 6, out=torch.empty(3, 6, 5, 6))


def test_step_errors_name_the_argument() -> None:
    x, windows, weights = torch.randn(3, 6, 5, 6), torch.randn(2, 3, 4, 5, 6), torch.ones(2, 4)
    step = ops.fused_window_step
    with pytest.raises(ValueError, match=r"fused_window_step: predictions must be one to 4 tensors, got 5"):
        step(x, [windows] * 5, [1] * 6, [0, 2], weights)
    with pytest.raises(ValueError, match=r"coefficients must be \(a, b_1, ..., b_K\) = 3 numbers for 2 predictions"):
        step(x, [windows] * 2, [1, 1], [0, 2], weights)
    with pytest.raises(ValueError, match=r"predictions\[1\] must have shape \[n, C, f, H, W\] = \(2, 3, 4, 5, 6\)"):
        step(x, [windows, windows[:, :2]], [1, 1, 1], [0, 2], weights)
    with pytest.raises(TypeError, match=r"predictions must all be torch.float32 like x_t .* got torch.float64"):
        step(x, [windows.double()], [1, 1], [0, 2], weights)
    with pytest.raises(TypeError, match=r"got torch.bfloat16 for predictions\[1\]"):
        step(x, [windows, windows.bfloat16()], [1, 1, 1], [0, 2], weights)
