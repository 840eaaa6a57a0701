# SPDX-License-Identifier: Apache-2.0
"""audio_attention against torch's attention per frame, a float64 reference, and itself in other cuts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from emulated_device import Device
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from talkingdit import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    frames: int,
    per_frame: int,
    audio: int,
    heads: int = 2,
    dim: int = 32,
    batch: int = 1,
    dtype=torch.float64,
    speakers=0,
) -> tuple[Tensor, Tensor, Tensor]:
    people = (speakers,) if speakers else ()
    q = torch.randn(batch, frames * per_frame, heads, dim).to(dtype)
    k, v = (torch.randn(batch, *people, frames, audio, heads, dim).to(dtype) for _ in range(2))
    return q, k, v


def per_frame_attention(q: Tensor, k: Tensor, v: Tensor, per_frame: int) -> Tensor:
    """Torch's own attention with frames in the batch: the way it is done without this op."""
    batch, frames = k.shape[:2]
    queries = q.unflatten(1, (frames, per_frame)).flatten(0, 1).transpose(1, 2)
    keys, values = (x.flatten(0, 1).transpose(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(queries, keys, values)
    return out.transpose(1, 2).unflatten(0, (batch, frames)).flatten(1, 2)


@pytest.mark.parametrize("audio", [1, 5, 6, 7, 32, 70])
@pytest.mark.parametrize("dim", [32, 64, 128, 40, 7])
def test_equals_attention_with_frames_in_the_batch(audio: int, dim: int) -> None:
    q, k, v = make(3, 19, audio, dim=dim, batch=2)
    torch.testing.assert_close(ops.audio_attention(q, k, v, 19), per_frame_attention(q, k, v, 19))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("audio", [5, 40])
def test_error_is_at_most_twice_eager(dtype: torch.dtype, audio: int) -> None:
    q, k, v = make(3, 50, audio, dim=128, dtype=dtype)
    grad = torch.randn(q.shape).to(dtype)

    def run(function, cast: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(cast).requires_grad_() for x in (q, k, v)]
        out = function(*inputs, 50)
        return [out, *torch.autograd.grad(out, inputs, grad.to(cast))]

    truth = run(per_frame_attention, torch.float64)
    eager = run(per_frame_attention, dtype)
    ours = run(ops.audio_attention, dtype)
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), ours, eager, truth, strict=True):
        error, allowed = ((x.double() - t).abs().mean() for x in (a, b))
        assert error <= 2 * allowed, f"{name}: {error} against {allowed} of eager"


@pytest.mark.parametrize("window", [0, 1, 2])
@pytest.mark.parametrize("speakers", [0, 1, 3])
def test_windows_speakers_lengths_and_clips(window: int, speakers: int) -> None:
    q, k, v = make(6, 5, 4, dim=33, batch=2, speakers=speakers)
    shape = (2, speakers, 6) if speakers else (2, 6)
    options = {
        "window": window,
        "kv_lens": torch.randint(0, 5, shape),
        "weights": torch.rand(2, speakers, 30, dtype=torch.float64) if speakers else None,
        "cu_frames": [0, 1, 4, 6],
        "scale": 0.3,
    }
    ours = ops.audio_attention(q, k, v, 5, **options)
    torch.testing.assert_close(ours, ops.audio_attention_reference(q, k, v, 5, **options))
    # The reference itself, written out for one token: token 17 of sample 1 is in frame 3, whose clip is frames 1 to 3.
    total = torch.zeros(2, 33, dtype=torch.float64)
    for p in range(speakers or 1):
        key, value = (x[1, p] if speakers else x[1] for x in (k, v))
        lens = options["kv_lens"][1, p] if speakers else options["kv_lens"][1]
        seen = [(f, a) for f in range(max(1, 3 - window), 4) for a in range(int(lens[f]))]
        if not seen:
            continue
        keys, values = (torch.stack([x[f, a] for f, a in seen]) for x in (key, value))
        scores = torch.einsum("hd,ahd->ah", q[1, 17], keys) * 0.3
        weight = options["weights"][1, p, 17] if speakers else 1.0
        total += weight * torch.einsum("ah,ahd->hd", scores.softmax(0), values)
    torch.testing.assert_close(ours[1, 17], total)


def test_no_tokens_are_no_problem() -> None:
    """A shard may hold none. What would be the gradient of others' tokens is zero, not memory as it was."""
    for _ in range(3):
        q = torch.randn(2, 0, 3, 8)
        k, v = (torch.randn(2, 4, 5, 3, 8, requires_grad=True) for _ in range(2))
        ops.audio_attention(q, k, v, tokens_per_frame=6, token_offset=7).sum().backward()
        assert k.grad is not None
        assert v.grad is not None
        assert not k.grad.any()
        assert not v.grad.any()


def test_a_token_without_audio_gets_zeros_and_leaves_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in make(2, 3, 4))
    out = ops.audio_attention(q, k, v, 3, kv_lens=torch.tensor([[0, 2]]))
    assert out[:, :3].eq(0).all()
    assert out[:, 3:].ne(0).any()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.isfinite().all()
    _, grad_k, _ = torch.autograd.grad(ops.audio_attention(q, k, v, 3, kv_lens=torch.tensor([[0, 2]])).sum(), (q, k, v))
    assert grad_k[:, 0].eq(0).all()
    assert grad_k[:, 1, 2:].eq(0).all()
    assert grad_k[:, 1, :2].ne(0).any()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = make(1, 16, 5, dtype=torch.float32)
    out = ops.audio_attention(200 * q, 200 * k, v, 16)
    torch.testing.assert_close(out, per_frame_attention(200 * q, 200 * k, v, 16), rtol=1e-3, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(1, 4),
    per_frame=st.integers(1, 21),
    audio=st.integers(1, 14),
    heads=st.integers(1, 3),
    dim=st.integers(1, 70),
    window=st.integers(0, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_odd_sizes_and_shards(frames, per_frame, audio, heads, dim, window, dtype, data) -> None:
    tokens = frames * per_frame
    first = data.draw(st.integers(0, tokens - 1), label="first token of the shard")
    end = data.draw(st.integers(first + 1, tokens), label="end of the shard")
    q, k, v = make(frames, per_frame, audio, heads, dim, dtype=dtype)
    part = ops.audio_attention(q[:, first:end], k, v, per_frame, token_offset=first, window=window)
    whole = ops.audio_attention_reference(q, k, v, per_frame, window=window)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(part, whole[:, first:end], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [0, 1])
def test_gradients_of_shards_add_up_to_the_whole(window: int) -> None:
    q, k, v = make(3, 10, 5)
    weights, grad = torch.rand(1, 1, 30, dtype=torch.float64), torch.randn_like(q)

    def gradients(first: int, end: int) -> list[Tensor]:
        inputs = [
            x.clone().requires_grad_() for x in (q[:, first:end], k[:, None], v[:, None], weights[..., first:end])
        ]
        out = ops.audio_attention(*inputs[:3], 10, token_offset=first, window=window, weights=inputs[3])
        return list(torch.autograd.grad(out, inputs, grad[:, first:end]))

    whole, left, right = gradients(0, 30), gradients(0, 14), gradients(14, 30)  # the cut is inside frame 1
    torch.testing.assert_close(whole[0], torch.cat([left[0], right[0]], dim=1))
    torch.testing.assert_close(whole[1], left[1] + right[1])
    torch.testing.assert_close(whole[2], left[2] + right[2])
    torch.testing.assert_close(whole[3], torch.cat([left[3], right[3]], dim=2))


@pytest.mark.parametrize("speakers", [0, 2])
@pytest.mark.parametrize("window", [0, 1])
def test_gradcheck(speakers: int, window: int) -> None:
    tensors = [x.requires_grad_() for x in make(3, 2, 3, dim=5, speakers=speakers)]
    if speakers:
        tensors.append(torch.rand(1, speakers, 6, dtype=torch.float64, requires_grad=True))
    lens = torch.tensor([[3, 0, 2]])

    def function(q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None = None) -> Tensor:
        return ops.audio_attention(q, k, v, 2, window=window, kv_lens=lens, weights=weights, cu_frames=[0, 2, 3])

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strided_inputs(dtype: torch.dtype) -> None:
    packed = torch.randn(2, 12, 3, 2, 64).to(dtype)  # q, k, v beside each other, as a fused projection leaves them
    q = packed[:, :, 0]
    kv = torch.randn(2, 3, 2, 5, 2, 64).to(dtype)
    k, v = kv[:, :, 0], kv[:, :, 1]
    expected = ops.audio_attention(q.contiguous(), k.contiguous(), v.contiguous(), 4)
    assert torch.equal(ops.audio_attention(q, k, v, 4), expected)
    turned = q.transpose(-1, -2).contiguous().transpose(-1, -2)  # even the last axis
    assert torch.equal(ops.audio_attention(turned, k, v, 4), expected)
    out = torch.empty(2, 12, 2, 128, dtype=dtype)[..., :64]
    assert ops.audio_attention(q, k, v, 4, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_large_outputs_and_gradients_are_the_same_bits_every_time(threads: int) -> None:
    q, k, v = (
        x.requires_grad_() for x in make(5, 300, 5, heads=12, dim=128, dtype=torch.float32)
    )  # streams past caches
    grad = torch.randn_like(q)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = []
        for _ in range(2):
            out = ops.audio_attention(q, k, v, 300, window=1)
            runs.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)])
    finally:
        torch.set_num_threads(before)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
    whole = ops.audio_attention_reference(q[:, :64], k, v, 300, window=1)
    torch.testing.assert_close(runs[0][0][:, :64], whole, rtol=1e-5, atol=1e-5)


def test_opcheck_and_compile() -> None:
    q, k, v = (x.requires_grad_() for x in make(3, 4, 5, dtype=torch.float32, speakers=2))
    weights = torch.rand(1, 2, 12, requires_grad=True)
    lens = torch.tensor([[[3, 0, 5]]]).expand(1, 2, 3)
    clips = torch.tensor([[0, 2], [0, 2], [2, 3]])
    torch.library.opcheck(torch.ops.talkingdit.audio_attention, (q, k, v, weights, lens, clips, 4, 0, 1, 0.2))
    torch.library.opcheck(
        torch.ops.talkingdit.audio_attention,
        (q[:, :, :1], k[:, :1, ..., :1, :], v[:, :1, ..., :1, :], None, None, None) + (4, 0, 0, 0.2),
    )

    def function(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        return ops.audio_attention(q, k, v, 4, window=1, weights=weights, kv_lens=lens, cu_frames=[0, 2, 3]).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, weights), function(q, k, v, weights))
    grads = [torch.autograd.grad(f(q, k, v, weights).sum(), (q, k, v, weights)) for f in (compiled, function)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_say_what_is_wrong() -> None:
    q, k, v = make(3, 4, 5, dtype=torch.float32)
    several = k[:, None]
    with pytest.raises(
        ValueError, match=r"audio_attention: q must have 4 dimensions \[B, N, H, D\], got shape \(12, 2, 32\)"
    ):
        ops.audio_attention(q[0], k, v, 4)
    with pytest.raises(ValueError, match=r"k must have the batch, heads and head dim of q \(1, 2, 32\), got shape"):
        ops.audio_attention(q, k[..., :16], v[..., :16], 4)
    with pytest.raises(
        ValueError, match=r"v must have shape \[B, F, A, H, D\] = \(1, 3, 5, 2, 32\), got \(1, 3, 4, 2, 32\)"
    ):
        ops.audio_attention(q, k, v[:, :, :4], 4)
    with pytest.raises(TypeError, match=r"k must have the dtype of q \(torch.float32\), got torch.bfloat16"):
        ops.audio_attention(q, k.bfloat16(), v, 4)
    with pytest.raises(ValueError, match=r"tokens must lie inside the 3 frames of 4 tokens .* got tokens 1 to 13"):
        ops.audio_attention(q, k, v, 4, token_offset=1)
    with pytest.raises(ValueError, match=r"window must be 0 or more frames, got -1"):
        ops.audio_attention(q, k, v, 4, window=-1)
    with pytest.raises(ValueError, match=r"weights \[B, P, N\] must be given for k with a speaker axis, got None"):
        ops.audio_attention(q, several, several, 4)
    with pytest.raises(ValueError, match=r"weights need k with a speaker axis"):
        ops.audio_attention(q, k, v, 4, weights=torch.ones(1, 1, 12))
    with pytest.raises(ValueError, match=r"kv_lens must have shape \[B, F\] = \(1, 3\)"):
        ops.audio_attention(q, k, v, 4, kv_lens=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"cu_frames must rise from 0 to the number of frames 3, got \[0, 2\]"):
        ops.audio_attention(q, k, v, 4, cu_frames=[0, 2])
    with pytest.raises(RuntimeError, match=r"audio_attention: out= has no gradient"):
        ops.audio_attention(q.requires_grad_(), k, v, 4, out=torch.empty_like(q))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("speakers", [0, 2])
@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize(("audio", "dim"), [(5, 32), (7, 128), (3, 20)])
def test_emulated_cuda_kernels(
    device: Device, dtype: torch.dtype, speakers: int, window: int, audio: int, dim: int
) -> None:
    people, per_frame = ((speakers,) if speakers else ()), 6
    q = torch.randn(1, 15, 2, dim).to(dtype)
    k, v = (torch.randn(1, *people, 4, audio, 2, dim).to(dtype) for _ in range(2))
    weights = [torch.rand(1, speakers, 15).to(dtype)] if speakers else []
    options = {"token_offset": 3, "window": window, "kv_lens": torch.randint(1, audio + 1, (1, *people, 4))}

    def run(op, q, k, v, weights=None):  # type: ignore[no-untyped-def]
        return op(q, k, v, per_frame, weights=weights, **options)

    device.compare(
        lambda *t: run(ops.audio_attention, *t), lambda *t: run(ops.audio_attention_reference, *t), [q, k, v, *weights]
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dim", [32, 128, 40, 512])
def test_cuda_agrees_with_the_cpu(dim: int) -> None:
    q, k, v = make(4, 70, 9, dim=dim, batch=2, dtype=torch.float32, speakers=2)
    options = {"window": 1, "cu_frames": [0, 1, 4]}
    lens, weights, grad = torch.randint(0, 10, (2, 2, 4)), torch.rand(2, 2, 280), torch.randn_like(q)

    def run(device: str) -> list[Tensor]:
        inputs = [x.detach().to(device).requires_grad_() for x in (q, k, v, weights)]
        out = ops.audio_attention(*inputs[:3], 70, weights=inputs[3], kv_lens=lens.to(device), **options)
        return [x.cpu() for x in (out, *torch.autograd.grad(out, inputs, grad.to(device)))]

    for a, b in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("audio", [1, 5, 13, 32, 40, 64])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_cuda_tensor_cores_are_accurate_and_repeat_their_bits(dim: int, audio: int, dtype: torch.dtype) -> None:
    q, k, v = make(5, 333, audio, heads=5, dim=dim, dtype=dtype)
    grad = torch.randn(q.shape).to(dtype)

    def run(function, device: str, cast: torch.dtype) -> list[Tensor]:
        inputs = [x.to(device, cast, copy=True).requires_grad_() for x in (q, k, v)]
        out = function(*inputs, 333)
        return [x.cpu() for x in (out, *torch.autograd.grad(out, inputs, grad.to(device, cast)))]

    ours, again = (run(ops.audio_attention, "cuda", dtype) for _ in range(2))
    plain = run(ops.audio_attention_reference, "cpu", dtype)
    truth = run(ops.audio_attention_reference, "cpu", torch.float64)
    for a, b, p, t in zip(ours, again, plain, truth, strict=True):
        assert torch.equal(a, b)
        assert (a.double() - t).norm() <= 2 * (p.double() - t).norm()
