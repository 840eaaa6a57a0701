# SPDX-License-Identifier: Apache-2.0
"""What surrounds CUTLASS's products, without a GPU: frames cut into batches, patches written down, operands in place.

The product itself is torch's here, in float64, behind the checks of the real one's binding; what lies between the rows
that it is given is NaN.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from emulated_device import Device
from torch import Tensor

from talkingdit import ops
from talkingdit.ops import _framepack_gpu, _matrix_kernels

FRAME_LINEAR, FRAMEPACK = (sys.modules[f"talkingdit.ops.{name}"] for name in ("frame_linear", "framepack"))


class Hopper:
    """The emulated module, with a product."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def sm90_product(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        mask: Tensor | None,
        residual: Tensor | None,
        result: Tensor,
        b_transposed: bool,
    ) -> None:
        with pytest.raises(RuntimeError, match=r"sm90_product: this build has no kernels for compute capability 9\.0"):
            self.module.sm90_product(a, b, bias, gate, mask, residual, result, b_transposed)
        self.batches.append(a.shape[0])
        value = a.double() @ (b.double().mT if b_transposed else b.double())
        value = value if bias is None else value + bias
        value = value if gate is None else value * gate
        value = value if mask is None else value * mask[..., None]
        result.copy_(value if residual is None else residual + value)


@pytest.fixture
def hopper(device: Device, monkeypatch: pytest.MonkeyPatch) -> Hopper:
    native = Hopper(device.module)
    for module in (FRAME_LINEAR, _framepack_gpu):
        monkeypatch.setattr(module, "native", native)
        monkeypatch.setattr(module, "used_for", lambda x: True)
    monkeypatch.setattr(FRAMEPACK, "check_kernel", lambda *_: None)
    monkeypatch.setattr(_matrix_kernels, "check_kernel", lambda *_: None)
    monkeypatch.setattr(_matrix_kernels, "ready", lambda device: True)
    return native


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def draw(batch: int, tokens: int, frames: int, inner: int, dim: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (batch, tokens, inner), "weight": (batch, frames, inner, dim), "bias": (dim,), "gate": (dim,)}
    shapes |= {"mask": (batch, tokens), "residual": (batch, tokens, dim)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "frames", "per_frame", "offset", "inner", "dim", "batches"),
    [
        (2, 21, 3, 7, 0, 8, 16, [6]),  # whole frames of all samples at once
        (2, 21, 4, 7, 3, 8, 16, [2, 2, 2, 2]),  # a cut frame of both, two whole ones of either, a cut one of both
        (2, 14, 5, 7, 14, 8, 24, [2, 2]),  # some frames have no tokens here: samples' matrices lie apart
        (1, 3, 1, 7, 2, 15, 8, [1]),  # part of one frame; sums of an odd length
        (1, 9, 9, 1, 0, 3, 40, [9]),  # frames of one token
    ],
)
def test_frames_become_batches(
    hopper: Hopper, device: Device, dtype: torch.dtype, batch, tokens, frames, per_frame, offset, inner, dim, batches
) -> None:
    given = draw(batch, tokens, frames, inner, dim)
    given["residual"] = given["residual"].to(dtype)
    place = {"tokens_per_frame": per_frame, "token_offset": offset}
    truth = ops.frame_linear_reference(**{k: v.double() for k, v in given.items()}, **place)
    put = {name: device.put(value) for name, value in given.items()}
    out = ops.frame_linear(**put, **place, kernel="cutlass")
    assert hopper.batches == batches
    assert out.dtype == dtype
    assert relative(out, truth) < (4e-3 if dtype == torch.bfloat16 else 1e-6)
    stream = put["residual"]
    assert ops.frame_linear(**put, **place, out=stream, kernel="cutlass") is stream
    assert torch.equal(stream, out)
    plain = ops.frame_linear(put["x"], put["weight"], **place, kernel="cutlass")
    assert relative(plain, ops.frame_linear_reference(given["x"].double(), given["weight"].double(), **place)) < 4e-3


def test_parts_of_larger_tensors(hopper: Hopper, device: Device) -> None:
    """Operands are columns of wider ones, the residual is part of a longer stream; all else stays as it is."""
    given = draw(2, 12, 3, 24, 16)
    place = {"tokens_per_frame": 4}
    truth = ops.frame_linear_reference(**{k: v.double() for k, v in given.items()}, **place)
    wide = {name: device.empty(*value.shape[:-1], 40, dtype=value.dtype) for name, value in given.items()}
    x, weight = (wide[name][..., 8 : 8 + given[name].shape[-1]].copy_(given[name]) for name in ("x", "weight"))
    stream = device.empty(2, 15, 24, dtype=torch.bfloat16).fill_(7)
    noisy = stream[:, :12, :16].copy_(given["residual"])
    rest = {name: device.put(given[name]) for name in ("bias", "gate", "mask")}
    ops.frame_linear(x, weight, **rest, **place, residual=noisy, out=noisy, kernel="cutlass")
    assert hopper.batches == [3, 3]
    assert relative(noisy, truth) < 4e-3
    noisy.fill_(7)
    assert bool((stream == 7).all())


@pytest.mark.parametrize("padding", ["none", "zero", "replicate"])
@pytest.mark.parametrize("align", [16, 2])
@pytest.mark.parametrize("kernel", ["cutlass", "library"])
def test_patches_are_written_down(hopper: Hopper, device: Device, kernel: str, padding: str, align: int) -> None:
    """Runs of one, two, four and eight neighbours, sums of odd lengths, two samples, tokens of a longer sequence."""
    generator = torch.Generator().manual_seed(5)
    shares = (([2, 0], (1, 3, 3)), (range(3), (2, 2, 8)), ([1], (2, 4, 2)), (range(1, 3), (1, 2, 4)))
    latents = torch.randn(2, 3, 3, 7, 24, generator=generator).bfloat16()
    weights = [torch.randn(16, 3, *kernel, generator=generator).bfloat16() for _, kernel in shares]
    bias = torch.randn(16, generator=generator).bfloat16()
    biases = [bias, None, bias, bias]

    def buckets(convert: Any) -> list[ops.Bucket]:
        parameters = zip(shares, weights, biases, strict=True)
        return [ops.Bucket(f, k, convert(w), None if b is None else convert(b)) for (f, k), w, b in parameters]

    truth = ops.framepack_reference(latents.double(), buckets(Tensor.double), padding)
    stream = device.empty(2, truth.shape[1] + 4, 24, dtype=torch.bfloat16).fill_(7)
    tokens = stream[:, 3:-1, 8:]

    def put(value: Tensor) -> Tensor:
        return device.put(value, align)

    ops.framepack(put(latents), buckets(put), padding, out=tokens, kernel=kernel)
    products = 2 * sum(0 not in ops.bucket_grid(len(f), (7, 24), k, padding) for f, k in shares)
    assert len(hopper.batches) == products * (kernel == "cutlass")
    assert relative(tokens, truth) < 4e-3
    tokens.fill_(7)
    assert bool((stream == 7).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_patches_of_other_types_are_copied_too(device: Device, dtype: torch.dtype) -> None:
    latents = torch.randn(1, 2, 2, 4, 16).to(dtype)

    def run() -> list[Tensor]:
        matrices = torch.empty(32 * 16, dtype=dtype)
        device.module.framepack_patches(device.put(latents), matrices, [1], [1], [1, 1, 8], [1, 4, 2], 1)
        return [matrices[: 8 * 16]]

    (found,) = device.orders(run)
    expected = latents[0, :, 1].unflatten(-1, (2, 8)).permute(1, 2, 0, 3).reshape(-1)
    assert torch.equal(found, expected)


def test_what_was_measured_decides(hopper: Hopper, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: device.put(value) for name, value in draw(1, 8, 2, 16, 16).items()}

    def products() -> int:
        hopper.batches.clear()
        ops.frame_linear(**given, tokens_per_frame=4)
        return len(hopper.batches)

    assert products() == 0
    rules = {"other": ("framepack", (0, 99)), "shorter": ("frame_linear", (0, 16)), "fits": ("frame_linear", (16, 17))}
    for name, (op, inner) in rules.items():
        rule = _matrix_kernels.Measured(op, inner, columns=(16, 32), result_bytes=2)
        monkeypatch.setattr(_matrix_kernels, "MEASURED", (rule,))
        assert products() == (name == "fits")
    given["residual"] = given["residual"].float()  # measured for results of two bytes
    assert products() == 0


def test_what_cutlass_needs_is_said(hopper: Hopper, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: device.put(value) for name, value in draw(1, 8, 2, 16, 12).items()}
    with pytest.raises(
        ValueError, match="frame_linear: kernel 'cutlass' needs results and residuals whose rows are al"
    ):
        ops.frame_linear(**given, tokens_per_frame=4, kernel="cutlass")
    half = {name: value.half() for name, value in given.items()}
    with pytest.raises(ValueError, match=r"kernel 'cutlass' needs bfloat16, got torch\.float16, torch\.float16"):
        ops.frame_linear(**half, tokens_per_frame=4, kernel="cutlass")
    latents = device.put(torch.randn(1, 8, 1, 4, 4).bfloat16())
    for kernel in ("cutlass", "library"):
        with pytest.raises(ValueError, match=f"framepack: kernel '{kernel}' needs a weight in every bucket"):
            ops.framepack(latents, [ops.Bucket([0], (1, 2, 2))], kernel=kernel)
    monkeypatch.setattr(_matrix_kernels, "ready", lambda device: False)
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 9\.0 and a build with its kernels"):
        ops.frame_linear(**given, tokens_per_frame=4, kernel="cutlass")
