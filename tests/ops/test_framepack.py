# SPDX-License-Identifier: Apache-2.0
"""framepack against Conv3d per bucket, a float64 reference, and the numbers of official Wan-S2V and FramePack code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from talkingdit import ops
from talkingdit.ops import _matrix_kernels

GOLDEN = Path(__file__).parent.parent / "golden"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = [(1, 2, 2), (2, 4, 4), (4, 8, 8)]


def make(
    batch: int = 2, channels: int = 3, size=(7, 9, 13), out: int = 5, dtype=torch.float64, kernels=KERNELS
) -> tuple[Tensor, list[ops.Bucket]]:
    """Latents and one bucket per kernel, over frames that overlap and repeat, the last one without a bias."""
    latents = torch.randn(batch, channels, *size).to(dtype)
    frames = [[size[0] - 1, 0, 0], range(1, size[0] - 1), slice(None)]
    buckets = [
        ops.Bucket(
            frames[i],
            kernel,
            (torch.randn(out, channels, *kernel) / (channels * kernel[0] * kernel[1] * kernel[2]) ** 0.5).to(dtype),
            torch.randn(out).to(dtype) if i < len(kernels) - 1 else None,
        )
        for i, kernel in enumerate(kernels)
    ]
    return latents, buckets


def tensors_of(latents: Tensor, buckets: list[ops.Bucket]) -> list[Tensor]:
    return [latents, *(x for b in buckets for x in (b.weight, b.bias) if x is not None)]


def with_tensors(buckets: list[ops.Bucket], tensors: list[Tensor]) -> list[ops.Bucket]:
    rest = iter(tensors)
    return [
        ops.Bucket(b.frames, b.kernel, None if b.weight is None else next(rest), None if b.bias is None else next(rest))
        for b in buckets
    ]


def relative_rms(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())


@pytest.mark.parametrize("padding", ["none", "zero", "replicate"])
@pytest.mark.parametrize("pooled", [False, True])
def test_equals_conv3d_per_bucket(padding: str, pooled: bool) -> None:
    latents, buckets = make()
    if pooled:
        buckets = [ops.Bucket(b.frames, b.kernel) for b in buckets]
    tokens = ops.framepack(latents, buckets, padding)
    first = 0
    for bucket, frames in zip(buckets, ([6, 0, 0], range(1, 6), range(7)), strict=True):
        chosen = latents[:, :, list(frames)]
        if padding != "none":
            short = [-size % k for size, k in zip(chosen.shape[2:], bucket.kernel, strict=True)]
            edges = (0, short[2], 0, short[1], 0, short[0])
            chosen = F.pad(chosen, edges, mode="replicate" if padding == "replicate" else "constant")
        if pooled:
            expected = F.avg_pool3d(chosen, bucket.kernel)
        else:
            expected = F.conv3d(chosen, bucket.weight, bucket.bias, stride=bucket.kernel)
        expected = expected.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens[:, first : first + expected.shape[1]], expected)
        first += expected.shape[1]
    assert first == tokens.shape[1]
    torch.testing.assert_close(tokens, ops.framepack_reference(latents, buckets, padding))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_eager(dtype: torch.dtype) -> None:
    latents, buckets = make(1, 16, (7, 16, 24), 48, dtype)
    grad = torch.randn(ops.framepack(latents, buckets).shape).to(dtype)

    def run(function, cast: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(cast).requires_grad_() for x in tensors_of(latents, buckets)]
        out = function(inputs[0], with_tensors(buckets, inputs[1:]), "replicate")
        return [out, *torch.autograd.grad(out, inputs, grad.to(cast))]

    truth = run(ops.framepack_reference, torch.float64)
    eager = run(ops.framepack_reference, dtype)
    ours = run(ops.framepack, dtype)
    for i, (a, b, t) in enumerate(zip(ours, eager, truth, strict=True)):
        error, allowed = ((x.double() - t).abs().mean() for x in (a, b))
        assert error <= 2 * allowed + 1e-12, f"result {i}: {error} against {allowed} of eager"


@pytest.mark.parametrize("padding", ["none", "zero", "replicate"])
@pytest.mark.parametrize("pooled", [False, True])
def test_gradcheck(padding: str, pooled: bool) -> None:
    latents, buckets = make(1, 1, (3, 3, 5), 1, kernels=[(1, 2, 2), (2, 2, 3)])
    if pooled:
        buckets = [ops.Bucket(b.frames, b.kernel) for b in buckets]
    tensors = [x.requires_grad_() for x in tensors_of(latents, buckets)]

    def function(latents: Tensor, *rest: Tensor) -> Tensor:
        return ops.framepack(latents, with_tensors(buckets, list(rest)), padding)

    assert torch.autograd.gradcheck(function, tensors)


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 11), st.integers(1, 19)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)),
    channels=st.integers(1, 4),
    padding=st.sampled_from(["none", "zero", "replicate"]),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_odd_sizes(size, kernel, channels, padding, dtype) -> None:
    latents, buckets = make(2, channels, size, 3, dtype, kernels=[(1, 1, 1), kernel])
    buckets[1].frames = range(size[0])
    latents.requires_grad_()
    tokens = ops.framepack(latents, buckets, padding)
    expected = ops.framepack_reference(latents, buckets, padding)
    tolerance = 1e-12 if dtype == torch.float64 else 4e-2
    torch.testing.assert_close(tokens, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(tokens)
    found, wanted = (torch.autograd.grad(x, latents, grad)[0] for x in (tokens, expected))
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "kernel"), [((4, 5, 3), (1, 1, 2)), ((4, 6, 2), (1, 1, 2)), ((3, 5, 5), (1, 1, 4))])
def test_narrow_latents_are_right_in_op_and_reference(
    size: tuple[int, int, int], kernel: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Sizes for which torch's own conv3d of bfloat16 gives what it finds in memory, which varies."""
    for _ in range(20):
        latents, buckets = make(2, 1, size, 3, dtype, kernels=[kernel])
        buckets[0].frames = range(size[0])
        wide = [x.double() for x in tensors_of(latents, buckets)]
        exact = ops.framepack_reference(wide[0], with_tensors(buckets, wide[1:]), "none")
        for op in (ops.framepack, ops.framepack_reference):
            assert relative_rms(op(latents, buckets, "none"), exact) < 2 * torch.finfo(dtype).eps


def test_strided_latents_negative_frames_and_out() -> None:
    latents, buckets = make(dtype=torch.float32)
    expected = ops.framepack(latents, buckets, "replicate")
    for order in ([0, 2, 1, 3, 4], [4, 3, 2, 1, 0]):
        strided = latents.permute(order).contiguous().permute([order.index(i) for i in range(5)])
        assert not strided.is_contiguous()
        assert torch.equal(ops.framepack(strided, buckets, "replicate"), expected)
    buckets[0].frames = [-1, -7, 0]
    out = torch.empty_like(expected)
    assert ops.framepack(latents, buckets, "replicate", out=out) is out
    assert torch.equal(out, expected)


def test_same_bits_every_time() -> None:
    latents, buckets = make(1, 16, (7, 30, 52), 64, torch.float32)
    inputs = [x.requires_grad_() for x in tensors_of(latents, buckets)]
    runs = []
    for _ in range(2):
        tokens = ops.framepack(latents, buckets, "replicate")
        runs.append([tokens, *torch.autograd.grad(tokens.square().sum(), inputs)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_opcheck_and_compile() -> None:
    latents, buckets = make(dtype=torch.float32)
    inputs = [x.requires_grad_() for x in tensors_of(latents, buckets)]
    weights = [b.weight for b in buckets]
    biases = [torch.empty(0) if b.bias is None else b.bias for b in buckets]
    options = ([6, 0, 0, 1, 2, 3, 4, 5, 6], [3, 2, 4], [k for kernel in KERNELS for k in kernel], 2, "auto")
    torch.library.opcheck(torch.ops.talkingdit.framepack, (latents, weights, biases, *options))

    def function(latents: Tensor, *rest: Tensor) -> Tensor:
        return ops.framepack(latents, with_tensors(buckets, list(rest)), "replicate").sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    grads = [torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled, function)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", ["aligned", "padded", "only_1x"])
def test_official_framepack_numbers(case: str) -> None:
    golden = {
        k.removeprefix(case + "/"): v.float() if v.dtype == torch.bfloat16 else v
        for k, v in load_file(GOLDEN / "framepack.safetensors").items()
        if k.startswith(case + "/")
    }
    names = [("_4x", "clean_x_embedder.proj_4x"), ("_2x", "clean_x_embedder.proj_2x"), ("", "clean_x_embedder.proj")]
    parts, times, buckets = [], [], []

    def add(latents: Tensor, indices: Tensor, layer: str) -> None:
        weight = golden[f"state/{layer}.weight"]
        first = len(times)
        times.extend(indices.T.tolist())  # one position per sample
        parts.append(latents)
        buckets.append(
            ops.Bucket(range(first, len(times)), tuple(weight.shape[2:]), weight, golden[f"state/{layer}.bias"])
        )

    for suffix, layer in names:
        if f"in/clean_latents{suffix}" in golden:
            add(golden[f"in/clean_latents{suffix}"], golden[f"in/clean_latent{suffix}_indices"], layer)
    add(golden["in/latents"], golden["in/latent_indices"], "x_embedder.proj")
    latents = torch.cat(parts, dim=2)
    assert relative_rms(ops.framepack(latents, buckets, "replicate"), golden["out/tokens"]) <= 1e-6

    split = {32: (8, 12, 12), 128: (16, 56, 56)}[golden["out/rope"].shape[-1]]  # stored without the equal neighbours
    for sample, expected in enumerate(golden["out/rope"]):
        positions = [time[min(sample, len(time) - 1)] for time in times]
        segments = ops.framepack_segments(buckets, latents.shape[3:], positions, mode="average", padding="replicate")
        rotations = ops.RopeLayout(segments, split=split, theta=256.0).rotations()
        assert relative_rms(torch.cat([rotations.real, rotations.imag], dim=-1), expected) <= 1e-6


def test_official_initial_weights() -> None:
    golden = load_file(GOLDEN / "framepack.safetensors")
    weight, bias = (golden[f"aligned/state/x_embedder.proj.{name}"].float() for name in ("weight", "bias"))
    for layer in ("proj", "proj_2x", "proj_4x"):
        expected = golden[f"aligned/state/clean_x_embedder.{layer}.weight"].float()
        found, copied = ops.init_bucket_weight(weight, bias, tuple(expected.shape[2:]))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        assert torch.equal(copied, golden[f"aligned/state/clean_x_embedder.{layer}.bias"].float())


def test_official_wan_s2v_numbers() -> None:
    golden = load_file(GOLDEN / "wan_s2v.safetensors")
    latents = golden["official/clip1_motion/in/motion_latents"].float()
    layers = [("proj", [18]), ("proj_2x", [16, 17]), ("proj_4x", range(16))]
    buckets = []
    for layer, frames in layers:
        weight, bias = (golden[f"official/state/frame_packer.{layer}.{name}"].float() for name in ("weight", "bias"))
        buckets.append(ops.Bucket(frames, tuple(weight.shape[2:]), weight, bias))
    tokens = golden["official/clip1_motion/mid/framepack_tok0"]
    assert relative_rms(ops.framepack(latents, buckets, "none"), tokens) <= 1e-6
    table = golden["official/clip1_motion/mid/framepack_rope0"].double()
    half = table.shape[2]
    split = (2 * (half - 2 * (half // 3)), 2 * (half // 3), 2 * (half // 3))
    segments = ops.framepack_segments(buckets, latents.shape[3:], range(-19, 0), padding="none")
    assert [segment.t[0].item() for segment in segments] == [-1, -3, -19]
    assert [row.item() for row in segments[2].t] == [-19, -14, -9, -4]
    rotations = torch.view_as_real(ops.RopeLayout(segments, split=split).rotations())
    assert relative_rms(rotations.expand_as(table), table) <= 1e-6


def test_errors_say_what_is_wrong() -> None:
    latents, buckets = make(dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"framepack: latents must have 5 dimensions \[B, C, T, H, W\], got shape \(3, 7"
    ):
        ops.framepack(latents[0], buckets)
    with pytest.raises(ValueError, match=r"padding must be one of none, zero, replicate, got 'same'"):
        ops.framepack(latents, buckets, "same")
    with pytest.raises(ValueError, match=r"framepack: frames must lie in -7 \.\. 6, got 7"):
        ops.framepack(latents, [ops.Bucket([7], (1, 2, 2), buckets[0].weight)])
    with pytest.raises(TypeError, match=r"frames of a bucket must be a range, slice or list, got 3"):
        ops.framepack(latents, [ops.Bucket(3, (1, 2, 2), buckets[0].weight)])
    with pytest.raises(ValueError, match=r"frames of a bucket must name at least one frame"):
        ops.framepack(latents, [ops.Bucket([], (1, 2, 2), buckets[0].weight)])
    with pytest.raises(
        ValueError, match=r"weight of bucket 0 must have shape \[out, C, kt, kh, kw\] = \(5, 3, 2, 2, 2\)"
    ):
        ops.framepack(latents, [ops.Bucket([0], (2, 2, 2), buckets[0].weight)])
    with pytest.raises(TypeError, match=r"weight of bucket 0 must have the dtype of latents \(torch.float32\)"):
        ops.framepack(latents, [ops.Bucket([0], (1, 2, 2), buckets[0].weight.double())])
    with pytest.raises(ValueError, match=r"same number of output channels, got \[3, 5\]"):
        ops.framepack(latents, [buckets[0], ops.Bucket([0], (1, 2, 2))])
    with pytest.raises(ValueError, match=r"kernel must be a multiple of the base kernel \(1, 2, 2\), got \(2, 3, 4\)"):
        ops.init_bucket_weight(buckets[0].weight, None, (2, 3, 4))
    with pytest.raises(ValueError, match=r"framepack_segments: mode must be 'subsample' or 'average', got 'mean'"):
        ops.framepack_segments(buckets, (9, 13), range(7), mode="mean")
    with pytest.raises(RuntimeError, match=r"framepack: out= has no gradient"):
        ops.framepack(latents.requires_grad_(), buckets, out=torch.empty(2, 149, 5))


@pytest.mark.cuda
@pytest.mark.parametrize("padding", ["none", "zero", "replicate"])
@pytest.mark.parametrize("pooled", [False, True])
def test_cuda_agrees_with_the_cpu(padding: str, pooled: bool) -> None:
    latents, buckets = make()
    if pooled:
        buckets = [ops.Bucket(b.frames, b.kernel) for b in buckets]
    grad = torch.randn_like(ops.framepack(latents, buckets, padding))

    def run(device: str) -> list[Tensor]:
        inputs = [x.detach().to(device).requires_grad_() for x in tensors_of(latents, buckets)]
        out = ops.framepack(inputs[0], with_tensors(buckets, inputs[1:]), padding)
        return [x.cpu() for x in (out, *torch.autograd.grad(out, inputs, grad.to(device)))]

    for a, b in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_error_is_at_most_twice_eager_on_the_cpu(dtype: torch.dtype) -> None:
    """Wan-S2V's history, with sums long enough to be cut into parts; the same bits every time."""
    latents, buckets = make(1, 16, (19, 24, 40), 200, dtype)
    grad = torch.randn(ops.framepack(latents, buckets).shape).to(dtype)

    def run(function, cast: torch.dtype, device: str) -> list[Tensor]:
        inputs = [x.detach().to(device, cast).requires_grad_() for x in tensors_of(latents, buckets)]
        out = function(inputs[0], with_tensors(buckets, inputs[1:]), "replicate")
        return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, inputs, grad.to(device, cast)))]

    truth = run(ops.framepack_reference, torch.float64, "cpu")
    eager = run(ops.framepack_reference, dtype, "cpu")
    ours, again = (run(ops.framepack, dtype, "cuda") for _ in range(2))
    for i, (a, b, t, same) in enumerate(zip(ours, eager, truth, again, strict=True)):
        assert torch.equal(a, same)
        error, allowed = (float((x.double() - t).norm() / t.norm()) for x in (a, b))
        assert error <= 2 * allowed, f"result {i}: {error} against {allowed} of eager"


@pytest.mark.cuda
@pytest.mark.parametrize("padding", ["none", "zero", "replicate"])
@pytest.mark.parametrize(
    ("batch", "channels", "size", "out"), [(1, 16, (19, 56, 104), 640), (2, 3, (7, 9, 21), 72)], ids=["wan", "odd"]
)
@pytest.mark.parametrize("kernel", ["general", "cutlass", "library"])
def test_cuda_kernels_agree_with_float64(kernel: str, batch, channels, size, out, padding: str) -> None:
    """Tokens go where they belong in a longer sequence, and nowhere else; the same bits every time, and in a graph."""
    if kernel == "cutlass" and not _matrix_kernels.ready(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("needs a GPU of compute capability 9.0 and a build for it")
    latents, buckets = make(batch, channels, size, out, torch.bfloat16)
    wide = [x.double() for x in tensors_of(latents, buckets)]
    truth = ops.framepack_reference(wide[0], with_tensors(buckets, wide[1:]), padding)
    moved = [x.cuda() for x in tensors_of(latents, buckets)]
    given = with_tensors(buckets, moved[1:])
    tokens = ops.framepack(moved[0], given, padding, kernel=kernel)
    assert relative_rms(tokens.cpu(), truth) < 5e-3
    sequence = torch.full((batch, truth.shape[1] + 9, out + 8), 7.0, device="cuda", dtype=torch.bfloat16)
    part = sequence[:, 4:-5, 8:]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.framepack(moved[0], given, padding, out=part, kernel=kernel)
    graph.replay()
    assert torch.equal(part, tokens)
    part.fill_(7)
    assert bool((sequence == 7).all())
