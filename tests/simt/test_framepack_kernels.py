# SPDX-License-Identifier: Apache-2.0
"""framepack's GPU kernels, emulated: gathered tiles, both paddings, cut sums, and the two gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from emulated_device import Device
from torch import Tensor

from talkingdit import ops
from talkingdit.ops import _framepack_gpu

BASE, FINE, COARSE = (1, 2, 2), (2, 4, 4), (4, 8, 8)


@pytest.fixture
def gpu(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(_framepack_gpu, "native", device.module)
    monkeypatch.setattr(_framepack_gpu, "used_for", lambda latents: True)
    monkeypatch.setattr(_framepack_gpu, "_in_library", lambda *_: False)
    return device


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes every sum be cut into (at most) so many parts, as large inputs would."""

    def make(parts: int) -> None:
        def plan(product: str, sizes: Sequence[tuple[int, int, int]], item_size: int) -> tuple[tuple[int, ...], int]:
            total = 0
            for patches, out, taps in sizes:
                rows, columns = {
                    "project": (patches, out),
                    "grad_latents": (patches, taps),
                    "grad_weights": (out, taps),
                }[product]
                total += -(-parts * (rows * columns + out * (product == "grad_weights")) // 4) * 4
            return (parts,) * len(sizes), total

        monkeypatch.setattr(_framepack_gpu, "plan", plan)

    return make


def history(
    batch: int, channels: int, size: tuple[int, int, int], out: int, dtype: torch.dtype, *shares: tuple[Any, ...]
) -> tuple[Tensor, list[ops.Bucket]]:
    """Latents and buckets; a share is (frames, kernel) and, for no weight or no bias, a word that says so."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(batch, channels, *size, generator=generator).to(dtype)
    buckets = []
    for frames, kernel, *rest in shares:
        if "pooled" in rest:
            buckets.append(ops.Bucket(frames, kernel))
            continue
        weight = torch.randn(out, channels, *kernel, generator=generator)
        bias = None if "unbiased" in rest else torch.randn(out, generator=generator).to(dtype)
        buckets.append(ops.Bucket(frames, kernel, (weight / weight[0].numel() ** 0.5).to(dtype), bias))
    return latents, buckets


def buckets_in(buckets: Sequence[ops.Bucket], dtype: torch.dtype) -> list[ops.Bucket]:
    parameters = [(b.weight, b.bias) for b in buckets]
    cast = [[None if x is None else x.to(dtype) for x in pair] for pair in parameters]
    return [ops.Bucket(b.frames, b.kernel, *pair) for b, pair in zip(buckets, cast, strict=True)]


def check(
    device: Device,
    latents: Tensor,
    buckets: Sequence[ops.Bucket],
    padding: str,
    place: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Tokens and all gradients: the same bits in every order of threads, and at most twice the error of eager."""
    parameters = [x for b in buckets for x in (b.weight, b.bias) if x is not None]

    def run(function: Callable[..., Tensor], put: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [put(x).requires_grad_() for x in (latents, *parameters)]
        rest = iter(leaves[1:])
        given = [
            ops.Bucket(
                b.frames, b.kernel, None if b.weight is None else next(rest), None if b.bias is None else next(rest)
            )
            for b in buckets
        ]
        tokens = function(leaves[0], given, padding)
        probe = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3)).to(latents.dtype)
        return [tokens.detach(), *torch.autograd.grad(tokens, leaves, put(probe), materialize_grads=True)]

    ours = device.orders(lambda: run(ops.framepack, place or device.put))
    eager = run(ops.framepack_reference, lambda x: x.clone())
    truth = run(ops.framepack_reference, lambda x: x.double())
    for index, (a, b, t) in enumerate(zip(ours, eager, truth, strict=True)):
        assert a.shape == t.shape
        assert a.isfinite().all(), f"result {index} was not written everywhere"
        error, allowed = (float((x.double() - t).norm() / t.norm().clamp_min(1e-30)) for x in (a, b))
        if latents.dtype == torch.float64:
            allowed = 1e-15  # eager computes the truth itself
        assert error <= 2 * allowed, f"result {index}: error {error:.3g}, {allowed:.3g} of eager"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("padding", ["zero", "replicate"])
def test_all_scales(gpu: Device, cut: Callable[[int], None], dtype: torch.dtype, padding: str) -> None:
    """FramePack's three scales over frames that are padded on every axis, two samples, two tiles of outputs."""
    cut(2)
    latents, buckets = history(
        2, 3, (6, 9, 21), 131, dtype, (range(1, 6), COARSE), ([5, 0, 5], FINE, "unbiased"), ([5], BASE)
    )
    check(gpu, latents, buckets, padding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_history_of_wan_s2v(gpu: Device, dtype: torch.dtype) -> None:
    """16 channels, whole patches: copies of 4, 8 and 16 bytes, and sums of 4096 terms in as many parts as planned."""
    latents, buckets = history(1, 16, (19, 8, 24), 40, dtype, ([18], BASE), ([16, 17], FINE), (range(16), COARSE))
    check(gpu, latents, buckets, "none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("padding", ["none", "zero", "replicate"])
def test_odd_kernels_averages_and_strides(gpu: Device, padding: str, dtype: torch.dtype) -> None:
    """Latents that are a view, memory aligned to single elements, patches of odd width, averages, more patches than
    latents."""
    latents, buckets = history(
        2, 5, (3, 7, 13), 5, dtype, ([2, 0], (1, 3, 3)), (range(3), (2, 2, 5), "pooled"), ([1], (2, 4, 2), "unbiased")
    )

    def place(value: Tensor) -> Tensor:
        if value.shape != latents.shape:
            return gpu.put(value, align=value.element_size())
        wide = gpu.empty(3, 2, 5, 7, 16, dtype=dtype, align=dtype.itemsize).permute(1, 2, 0, 3, 4)[..., 2:-1]
        return wide.copy_(value.detach())

    check(gpu, latents, buckets, padding, place)


@pytest.mark.parametrize("padding", ["none", "replicate"])
def test_long_histories_and_wide_rows(gpu: Device, padding: str) -> None:
    """More frames in a bucket than a warp looks at in one go, some of them twice, and rows longer than a warp."""
    frames = [*range(34), 33, 0, 33, 5]
    latents, buckets = history(1, 2, (34, 4, 38), 8, torch.float32, (frames, BASE), (frames, (2, 4, 2)))
    check(gpu, latents, buckets, padding)


def test_parts_that_get_no_step(gpu: Device, cut: Callable[[int], None]) -> None:
    """More parts than steps: some sum nothing, and say so."""
    cut(5)
    latents, buckets = history(1, 8, (2, 6, 20), 36, torch.bfloat16, ([0, 1], FINE), ([1], BASE))
    check(gpu, latents, buckets, "zero")


def test_rows_of_a_longer_sequence(gpu: Device) -> None:
    """Tokens go where they belong in a larger tensor and nowhere else."""
    latents, buckets = history(2, 4, (1, 10, 12), 24, torch.float16, ([0], BASE))
    expected = ops.framepack_reference(latents.float(), buckets_in(buckets, torch.float32))
    whole = gpu.empty(2, 40, 32, dtype=torch.float16).fill_(7)
    tokens = whole[:, 5:35, 3:27]
    ops.framepack(gpu.put(latents), buckets, out=tokens)
    torch.testing.assert_close(tokens.float(), expected, rtol=2e-3, atol=2e-3)
    tokens.fill_(7)
    assert bool((whole == 7).all())


def test_binding_refuses_what_does_not_fit(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, buckets = history(1, 4, (1, 8, 8), 16, torch.bfloat16, ([0], BASE))
    monkeypatch.setattr(_framepack_gpu, "plan", lambda *_: ((2,), 100))
    with pytest.raises(ValueError, match=r"framepack_product: workspace must have 512 elements"):
        ops.framepack(latents, buckets)
    monkeypatch.setattr(_framepack_gpu, "plan", lambda *_: ((0,), 0))
    with pytest.raises(ValueError, match=r"framepack_product: splits must be from 1 to 32767"):
        ops.framepack(latents, buckets)
