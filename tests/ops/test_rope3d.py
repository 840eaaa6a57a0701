# SPDX-License-Identifier: Apache-2.0
"""Rotations of every model family, against numbers of the official code and float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import DTYPES, relative, with_gradients
from emulated_device import Device
from hypothesis import given, settings
from hypothesis import strategies as st
from rope_layouts import HEADS, make_layout, small_layout
from safetensors import safe_open
from torch import Tensor

from talkingdit import ops
from talkingdit.ops import RopeLayout, Segment

GOLDEN = Path(__file__).parent.parent / "golden" / "rope3d.safetensors"
CASES = ["framepack_d32", "hunyuan_ref_tm1", "hunyuan_small", "s2v_d128", "wan_pad_d128", "wan_plain_d32"]


def wan_split(d: int) -> tuple[int, int, int]:
    return d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6)


def s2v_segment(start: list[int], end: list[int], span: list[int]) -> Segment:
    """Positions of Wan-S2V: integers cut from evenly spaced points; time before the video counts backwards."""
    axes = []
    for first, stop, size in zip(start, end, span, strict=True):
        if first < 0:
            axes.append(-np.linspace(-first, -first - size + 1, stop - first).astype(int))
        else:
            axes.append(np.linspace(first, first + size - 1, stop - first).astype(int))
    return Segment(*axes)


def golden_layouts(spec: dict[str, Any]) -> list[RopeLayout]:
    """One layout per sample of a golden case."""
    if spec["kind"] == "wan":
        layouts = []
        for grid in spec["grids"]:
            total = max(int(np.prod(g)) for g in spec["grids"]) + spec["extra"]
            segments = [Segment(*(range(n) for n in grid))]
            if rest := total - int(np.prod(grid)):
                segments.append(Segment([0] * rest))  # padding is not rotated
            layouts.append(RopeLayout(segments, wan_split(spec["d"])))
        return layouts
    if spec["kind"] == "wan_s2v":
        return [RopeLayout([s2v_segment(*segment) for segment in spec["segs"]], wan_split(spec["d"]))]
    if spec["kind"] == "hunyuan":
        frames, height, width = spec["sizes"]
        times = [spec["concat"]["bias"], *range(frames)]
        return [RopeLayout([Segment(times, range(height), range(width))], spec["dims"], spec["theta"])]
    return [RopeLayout([Segment(spec["idx"], range(spec["H"]), range(spec["W"]))], spec["dims"], spec["theta"])]


@pytest.mark.parametrize("case", CASES)
def test_official_rotations_are_reproduced(case: str) -> None:
    with safe_open(GOLDEN, "pt") as file:
        spec = json.loads(file.metadata()["spec"])[case]
        layouts = golden_layouts(spec)
        for name in ("q", "k"):
            x, expected = file.get_tensor(f"{case}/fp32/in/{name}"), file.get_tensor(f"{case}/fp32/out/{name}")
            for b, layout in enumerate(layouts):
                assert relative(ops.rope3d(x[b : b + 1], layout), expected[b : b + 1]) < 1e-6
            packed = ops.rope3d(x.flatten(0, 1)[None], RopeLayout.packed(layouts))
            assert relative(packed, expected.flatten(0, 1)[None]) < 1e-6
        x, expected = file.get_tensor(f"{case}/bf16/in/q"), file.get_tensor(f"{case}/bf16/out/q")
        for b, layout in enumerate(layouts):
            difference = ops.rope3d(x[b : b + 1], layout).double() - expected[b : b + 1].double()
            wrong = difference.abs() > 0
            assert wrong.double().mean() < 2e-3  # the official code rounds twice
            assert (difference.abs() <= expected[b : b + 1].double().abs() * 2**-7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_error_is_at_most_twice_that_of_eager(dtype: torch.dtype, pairing: str) -> None:
    layout = make_layout(pairing)
    inputs = [torch.randn(2, len(layout), 3, 20).to(dtype)]
    ours, eager = (lambda x: ops.rope3d(x, layout)), (lambda x: ops.rope3d_reference(x, layout))
    exact = with_gradients(eager, [v.double() for v in inputs])
    floor = 4 * torch.finfo(dtype).eps if dtype == torch.float64 else 0.0
    for a, b, truth in zip(with_gradients(ours, inputs), with_gradients(eager, inputs), exact, strict=True):
        assert relative(a, truth) <= 2 * relative(b, truth) + floor


def test_mean_of_positions_is_a_plain_mean_of_rotations() -> None:
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    both = ops.rope3d(x, RopeLayout([Segment([[1, 4]])], (8,)))
    each = [ops.rope3d(x, RopeLayout([Segment([p])], (8,))) for p in (1, 4)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_inverse_undoes_the_rotation_and_relative_positions_alone_matter() -> None:
    layout = make_layout()
    x = torch.randn(1, len(layout), 2, 20, dtype=torch.float64)
    plain = RopeLayout(layout.segments[:2], layout.split)
    y = ops.rope3d(x[:, : len(plain)], plain)
    torch.testing.assert_close(ops.rope3d(y, plain, inverse=True), x[:, : len(plain)])
    near, far = (RopeLayout([Segment([t, t + 3])], (20,)) for t in (0, 1000))
    pair = torch.randn(1, 2, 1, 20, dtype=torch.float64)
    dots = [(r[0, 0, 0] * r[0, 1, 0]).sum() for r in (ops.rope3d(pair, near), ops.rope3d(pair, far))]
    torch.testing.assert_close(dots[0], dots[1])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=4),
    pairs=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)),
    heads=st.integers(1, 3),
    half=st.booleans(),
    data=st.data(),
)
def test_shards_and_strides_change_nothing(
    sizes: list[tuple[int, int, int]], pairs: tuple[int, int, int], heads: int, half: bool, data: Any
) -> None:
    segments = [Segment(*(np.random.default_rng(n).normal(size=n) * 9 for n in size)) for size in sizes]
    layout = RopeLayout(segments, [2 * p for p in pairs], pairing="half" if half else "interleaved")
    dim = 2 * sum(pairs)
    wide = torch.randn(2, len(layout), 3, heads, dim + 5)
    x = wide[:, :, 1, :, :dim].transpose(1, 2).contiguous().transpose(1, 2)  # heads before tokens in memory
    whole = ops.rope3d(x, layout)
    assert relative(whole, ops.rope3d_reference(x.double(), layout)) < 2e-7
    torch.testing.assert_close(ops.rope3d(wide[:, :, 1, :, :dim], layout), whole, rtol=0, atol=0)
    cut = data.draw(st.integers(0, len(layout)))
    parts = [ops.rope3d(x[:, :cut], layout), ops.rope3d(x[:, cut:], layout, token_offset=cut)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=0)


def test_out_receives_the_result_also_in_place() -> None:
    layout = make_layout("half")
    x = torch.randn(2, len(layout), 3, 20, dtype=torch.bfloat16)
    expected = ops.rope3d(x, layout)
    assert torch.equal(ops.rope3d(x, layout, out=torch.empty_like(x)), expected)
    copy = x.clone()
    assert ops.rope3d(copy, layout, out=copy) is copy
    assert torch.equal(copy, expected)


def test_large_results_are_right_too() -> None:
    """Beyond the size of the last cache results are written past it."""
    layout = RopeLayout([Segment(range(6), range(30), range(52))])
    x = torch.randn(1, len(layout), 12, 128)
    sample = slice(4321, 4400)
    y = ops.rope3d(x, layout)[:, sample]
    torch.testing.assert_close(y, ops.rope3d_reference(x[:, sample], layout, token_offset=4321), rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    layout = make_layout(split=(2, 4, 2))
    x = torch.randn(1, len(layout), 1, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: ops.rope3d(v, layout, inverse=True), x)
    assert torch.autograd.gradgradcheck(lambda v: ops.rope3d(v, layout), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    layout = make_layout()
    x = torch.randn(2, len(layout), 3, 20, dtype=dtype, requires_grad=True)
    table, segments = layout.tables(x.device, x.dtype)
    rotation = (table, segments, layout.pairs, True)
    torch.library.opcheck(torch.ops.talkingdit.rope3d.default, (x, *rotation, 0, False))
    plain = x.detach()
    torch.library.opcheck(torch.ops.talkingdit.rope3d_out.default, (plain, *rotation, 0, False, torch.empty_like(x)))


def test_compiles_into_one_graph_with_dynamic_shapes() -> None:
    layout = make_layout()

    def model(x: Tensor, offset: int) -> Tensor:
        return ops.rope3d(x * 2, layout, token_offset=offset) + x

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, begin, end in ((1, 0, len(layout)), (2, 3, 20), (3, 7, 11)):
        x = torch.randn(batch, end - begin, 3, 20, requires_grad=True)
        grads = []
        for function in (model, compiled):
            result = function(x, begin)
            grads.append((result, *torch.autograd.grad(result.square().sum(), x)))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_errors_say_what_is_wrong() -> None:
    layout = make_layout()
    x = torch.randn(1, len(layout), 2, 20)
    with pytest.raises(ValueError, match=r"rope3d: x must have 4 dimensions \[B, N, H, D\], got shape \(2, 3\)"):
        ops.rope3d(torch.randn(2, 3), layout)
    with pytest.raises(ValueError, match=r"rope3d: split \(8, 6, 6\) is for head dim 20, got head dim 16"):
        ops.rope3d(x[..., :16], layout)
    with pytest.raises(ValueError, match=r"inside the layout of \d+ tokens, got tokens 1 to"):
        ops.rope3d(x, layout, token_offset=1)
    with pytest.raises(TypeError, match="x must be float32, float64, bfloat16 or float16, got"):
        ops.rope3d(x.long(), layout)
    with pytest.raises(TypeError, match="layout must be a RopeLayout, got list"):
        ops.rope3d(x, [layout])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        ops.rope3d(x.requires_grad_(), layout, out=torch.empty_like(x))
    with pytest.raises(ValueError, match="Segment: t\\[1\\] must be a finite position"):
        Segment([0, float("nan")])
    with pytest.raises(ValueError, match="split must be 1 or 3 even channel counts"):
        RopeLayout([Segment([0])], (3, 2, 2))
    with pytest.raises(ValueError, match="pairing must be 'interleaved' or 'half', got 'both'"):
        RopeLayout([Segment([0])], (2,), pairing="both")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "split", "pairing"), HEADS)
def test_emulated_cuda_kernels(
    device: Device, dtype: torch.dtype, heads: int, split: tuple[int, int, int], pairing: str
) -> None:
    layout = small_layout(split, pairing)
    device.compare(
        lambda x: ops.rope3d(x, layout, token_offset=5),
        lambda x: ops.rope3d_reference(x, layout, token_offset=5),
        [torch.randn(2, 20, heads, sum(split)).to(dtype)],
    )


def test_tables_are_held_for_the_streams_that_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table:
        def record_stream(self, stream: str) -> None:
            held.append(stream)

    held: list[str] = []
    layout, device, table = RopeLayout([Segment(range(3))], split=(8,)), torch.device("cuda", 0), Table()
    layout._on_device[(device, torch.float32)] = (table, table, "home")  # type: ignore[assignment]
    for stream, expected in (("home", []), ("side", ["side", "side"])):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, stream=stream: stream)
        assert layout.tables(device, torch.bfloat16) == (table, table)
        assert held == expected


@pytest.mark.cuda
def test_a_layout_may_be_dropped_while_another_stream_reads_its_tables() -> None:
    layout = RopeLayout([Segment(range(50), range(40), range(40))], split=(24, 20, 20))
    x = torch.randn(1, len(layout), 2, 64, device="cuda")
    expected = ops.rope3d(x, layout)
    fresh, side = RopeLayout(layout.segments, split=layout.split), torch.cuda.Stream()
    sizes = [table.shape for table in fresh.tables(x.device, x.dtype)]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        result = ops.rope3d(x, fresh)
    del fresh
    spoiled = [torch.full(size, 7.0, device="cuda") for size in sizes for _ in range(8)]
    side.synchronize()
    assert len(spoiled) == 16
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_cuda_agrees_with_cpu(dtype: torch.dtype, pairing: str) -> None:
    layout = make_layout(pairing)
    inputs = [torch.randn(2, len(layout), 3, 20).to(dtype)]
    expected = with_gradients(lambda x: ops.rope3d(x, layout), inputs)
    got = with_gradients(lambda x: ops.rope3d(x.cuda(), layout).cpu(), inputs)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 4 * torch.finfo(dtype).eps
