# SPDX-License-Identifier: Apache-2.0
"""Rows in eight bits and their products: codes to the bit, contracts, and what a product of them is worth."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative, usable_isas
from emulated_device import Device
from torch import Tensor

from talkingdit import ops
from talkingdit.ops import _eight_bit_library
from talkingdit.ops.eight_bit import KINDS, MOST, EightBitRows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUPS = [5, 5, 13]
kinds = pytest.mark.parametrize("kind", KINDS)
contracts = pytest.mark.parametrize("contract", ["exact", "close"])


def assert_same(got: EightBitRows, want: EightBitRows) -> None:
    assert got.dtype == want.dtype
    assert got.codes.dtype == want.codes.dtype
    assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))
    torch.testing.assert_close(got.scale, want.scale, rtol=0, atol=0, equal_nan=True)


def stream(dtype: torch.dtype = torch.float32, layers: torch.dtype = torch.bfloat16, dim: int = 72) -> list[Tensor]:
    """x, y, gate, scale, shift."""
    x, y = torch.randn(2, 13, dim) * 3 + 1, torch.randn(2, 13, dim)
    return [x.to(dtype), y.to(layers), *torch.randn(3, 2, 3, dim)]


def steps(got: EightBitRows, truth: Tensor) -> float:
    """Largest error of the rows against true values, in half steps of the codes."""
    error = (got.wide().double() - truth).abs()
    scale = got.scale[..., None].double()
    if got.codes.dtype == torch.int8:
        return float((error / (scale / 2)).max())
    half = torch.maximum(truth.abs() * 2.0**-4, scale * 2.0**-10)  # of e4m3: three bits, multiples of 2^-9 at least
    return float((error / half).max())


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 16, 37, 520])
def test_codes_are_those_of_pytorch(kind: str, dtype: torch.dtype, dim: int) -> None:
    x = (torch.randn(9, dim) * torch.logspace(-6, 4, 9)[:, None]).to(dtype)
    x[3] = 0
    got = ops.quantise_rows(x, kind)
    assert_same(got, ops.quantise_rows_reference(x, kind))
    assert steps(got, x.double()) <= 1 + 1e-5


@kinds
def test_every_code_and_every_tie(kind: str) -> None:
    """All codes, halfway between each two of them, and a hair beside that; 0 and the smallest float8 among them."""
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(KINDS[kind]).float()
    codes = bits[bits.isfinite() & (bits.abs() <= MOST[kind])].sort().values
    between = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, between, between.nextafter(codes[1:]), between.nextafter(codes[:-1])])[None]
    got = ops.quantise_rows(values, kind)
    assert float(got.scale) == 1
    assert_same(got, ops.quantise_rows_reference(values, kind))
    assert torch.equal(got.codes[0, : len(codes)].float(), codes)


@kinds
def test_what_is_not_finite_stays_so(kind: str) -> None:
    x = torch.randn(3, 40)
    x[0, 7], x[1, 39] = float("nan"), float("inf")
    weight = ops.quantise_rows(torch.randn(8, 40), kind)
    y = ops.eight_bit_linear(ops.quantise_rows(x, kind), weight.codes, weight.scale)
    assert not y[:2].isfinite().any()
    assert y[2].isfinite().all()


@kinds
@contracts
@pytest.mark.parametrize("layers", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [72, 37])
def test_norms_give_the_rows_of_their_unfused_selves(kind: str, contract: str, layers: torch.dtype, dim: int) -> None:
    """Exact: bits of norm, rounding, quantisation one after the other. Close: half a step from the true norm."""
    x, y, gate, scale, shift = stream(layers=layers, dim=dim)
    place: Any = {"groups": GROUPS, "token_offset": 0}
    norm = ops.norm_modulate_eight_bit(x, scale, shift, kind, dtype=layers, contract=contract, **place)
    total, both = ops.gate_residual_norm_modulate_eight_bit(x, y, gate, scale, shift, kind, contract=contract, **place)
    unfused_total, unfused = ops.gate_residual_norm_modulate(x, y, gate, scale, shift, dtype=layers, **place)
    assert torch.equal(total, unfused_total)
    if contract == "exact":
        assert_same(norm, ops.quantise_rows(ops.norm_modulate(x, scale, shift, dtype=layers, **place), kind))
        assert_same(both, ops.quantise_rows(unfused, kind))
        return
    wide = [v.double() for v in (x, y, gate, scale, shift)]
    truth = ops.gate_residual_norm_modulate_reference(*wide, **place)[1]
    assert steps(norm, ops.norm_modulate_reference(wide[0], *wide[3:], **place)) <= 1 + 1e-3
    assert steps(both, truth) <= 1 + 1e-3


@kinds
def test_contracts_differ_by_a_step_at_most(kind: str) -> None:
    x, _, _, scale, shift = stream(dim=512)
    exact, close = (
        ops.norm_modulate_eight_bit(x, scale, shift, kind, GROUPS, dtype=torch.bfloat16, contract=contract)
        for contract in ("exact", "close")
    )
    a, b = (_order(rows.codes) for rows in (exact, close))
    assert 0 < int((a - b).abs().max()) <= 1
    assert relative(exact.scale, close.scale) < 2.0**-8


def _order(codes: Tensor) -> Tensor:
    """Codes as integers that go up by one from each to the next."""
    if codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(kind: str, dtype: torch.dtype) -> None:
    x = (torch.randn(70, 1200) * 3).to(dtype)
    exact = ops.quantise_rows(x, kind, "gelu_tanh")
    assert_same(exact, ops.quantise_rows(ops.gelu_tanh(x), kind))
    close = ops.quantise_rows(x, kind, "gelu_tanh", "close")
    truth = F.gelu(x.double(), approximate="tanh")
    assert steps(close, truth) <= 1 + 1e-3
    far = torch.tensor([[-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 127.0]])
    assert torch.equal(ops.quantise_rows(far, "int8", "gelu_tanh", "close").codes[0, :4], torch.zeros(4).char())


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_rows(kind: str, dtype: torch.dtype, biased: bool) -> None:
    x, weight = ops.quantise_rows(torch.randn(2, 7, 48).to(dtype), kind), ops.quantise_rows(torch.randn(24, 48), kind)
    bias = torch.randn(24) if biased else None
    got = ops.eight_bit_linear(x, weight.codes, weight.scale, bias)
    want = ops.eight_bit_linear_reference(x._replace(dtype=torch.float64), weight.codes, weight.scale, bias)
    assert (got.shape, got.dtype) == (torch.Size([2, 7, 24]), dtype)
    assert relative(got, want) < torch.finfo(dtype).eps
    if kind == "fp8" and not biased:
        flat = x.codes.flatten(0, 1), x.scale.flatten()[:, None]
        torchs = torch._scaled_mm(
            flat[0], weight.codes.t(), scale_a=flat[1], scale_b=weight.scale[None], out_dtype=torch.bfloat16
        )
        assert relative(got.flatten(0, 1), torchs.double()) < 5e-3


@kinds
def test_error_of_a_layer(kind: str) -> None:
    """What quantising both sides costs a product of random numbers: 1 % for int8, 4 % for float8."""
    x, w = torch.randn(64, 512), torch.randn(96, 512)
    weight = ops.quantise_rows(w, kind)
    got = ops.eight_bit_linear(ops.quantise_rows(x, kind), weight.codes, weight.scale)
    assert relative(got, x.double() @ w.double().t()) < {"int8": 0.015, "fp8": 0.05}[kind]


def test_strides_and_places() -> None:
    x, _, _, scale, shift = stream(dim=40)
    wide = torch.randn(2, 13, 80)
    wide[..., :40] = x
    for kind in KINDS:
        whole = ops.norm_modulate_eight_bit(x, scale, shift, kind, GROUPS, dtype=torch.bfloat16)
        part = ops.norm_modulate_eight_bit(
            wide[:, 4:, :40], scale, shift, kind, GROUPS, token_offset=4, dtype=torch.bfloat16
        )
        assert_same(part, whole.narrow(4, 13))
        assert_same(ops.quantise_rows(wide[..., :40], kind), ops.quantise_rows(x, kind))


def test_out_receives_the_stream() -> None:
    x, y, gate, scale, shift = stream()
    want, rows = ops.gate_residual_norm_modulate_eight_bit(x, y, gate, scale, shift, "int8", GROUPS)
    got, same = ops.gate_residual_norm_modulate_eight_bit(x, y, gate, scale, shift, "int8", GROUPS, out=x)
    assert got is x
    assert torch.equal(x, want)
    assert_same(same, rows)


@kinds
def test_opcheck(kind: str) -> None:
    x, y, gate, scale, shift = stream()
    library, place, how = torch.ops.talkingdit, (0, GROUPS, 0, 1e-6), (kind, True)
    weight = ops.quantise_rows(torch.randn(8, 72), kind)
    utils = ("test_faketensor",) if kind == "fp8" else ("test_schema", "test_faketensor")  # it cannot compare float8
    check = torch.library.opcheck
    check(library.quantise_rows.default, (x[0], kind, True, True), test_utils=utils)
    check(library.norm_modulate_eight_bit.default, (x, scale, shift, *place, *how, torch.bfloat16), test_utils=utils)
    both = (x, y, gate, scale, shift, *place, *how)
    check(library.gate_residual_norm_modulate_eight_bit.default, both, test_utils=utils)
    check(library.gate_residual_norm_modulate_eight_bit_out.default, (*both, x.clone()), test_utils=utils)
    check(
        library.eight_bit_linear.default,
        (weight.codes, weight.scale, weight.codes, weight.scale, None, torch.bfloat16),
        test_utils=utils,
    )


@pytest.mark.parametrize("isa", usable_isas())
def test_instruction_sets_agree(isa: str) -> None:
    """Codes are the same whatever the processor has."""
    code = (
        "import torch; from talkingdit import ops; torch.manual_seed(0); x = torch.randn(5, 61)\n"
        "for kind in ('int8', 'fp8'):\n"
        "    a, b = ops.quantise_rows(x, kind), ops.quantise_rows_reference(x, kind)\n"
        "    assert torch.equal(a.scale, b.scale)\n"
        "    assert torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TALKINGDIT_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_errors_say_what_is_wrong() -> None:
    x, weight = torch.randn(3, 40), ops.quantise_rows(torch.randn(8, 40), "int8")
    with pytest.raises(ValueError, match="quantise_rows: kind must be one of int8, fp8, got 'int4'"):
        ops.quantise_rows(x, "int4")
    with pytest.raises(ValueError, match="contract must be one of exact, close, got 'near'"):
        ops.quantise_rows(x, "int8", contract="near")
    with pytest.raises(ValueError, match="activation must be None or 'gelu_tanh', got 'relu'"):
        ops.quantise_rows(x, "int8", "relu")
    with pytest.raises(TypeError, match=r"tensors must be float32, bfloat16 or float16, got torch\.float64"):
        ops.quantise_rows(x.double(), "int8")
    with pytest.raises(RuntimeError, match="rounding to eight bits has no gradient"):
        ops.quantise_rows(x.clone().requires_grad_(), "int8")
    with pytest.raises(TypeError, match="weight must have the dtype of x"):
        ops.eight_bit_linear(ops.quantise_rows(x, "fp8"), weight.codes, weight.scale)
    with pytest.raises(ValueError, match=r"weight must have shape \[N, K\] = \(8, 39\), got \(8, 40\)"):
        ops.eight_bit_linear(ops.quantise_rows(x[:, :39], "int8"), weight.codes, weight.scale)


# ---- CUDA kernels, emulated ------------------------------------------------------------------------------------------


def emulated_rows(device: Device, make: Any) -> EightBitRows:
    """Rows from emulated kernels, the same bits in every order of threads."""
    kept: list[Any] = []

    def run() -> list[Tensor]:
        rows = make()
        kept[:] = [rows]
        return [rows.codes.view(torch.uint8), rows.scale]

    codes, scale = device.orders(run)
    return EightBitRows(codes.view(kept[0].codes.dtype), scale, kept[0].dtype)


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 37, 1288])
def test_emulated_cuda_kernels_make_rows(device: Device, kind: str, dtype: torch.dtype, dim: int) -> None:
    x = (torch.randn(5, dim) * 3).to(dtype)
    x[2] = 0
    want = ops.quantise_rows_reference(x, kind)
    assert_same(emulated_rows(device, lambda: ops.quantise_rows(device.put(x), kind)), want)
    for exact in (True, False):
        contract = "exact" if exact else "close"
        rows = emulated_rows(
            device, lambda contract=contract: ops.quantise_rows(device.put(x), kind, "gelu_tanh", contract)
        )
        truth = F.gelu(x.double(), approximate="tanh")
        assert steps(rows, truth.to(dtype).double() if exact else truth) <= 1 + 2e-2


@kinds
@contracts
@pytest.mark.parametrize("layers", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 37, 1288])
@pytest.mark.parametrize("which", ["norm", "both"])
def test_emulated_cuda_kernels_norm_into_rows(
    device: Device, kind: str, contract: str, layers: torch.dtype, dim: int, which: str
) -> None:
    """Exact rows are those of the emulated kernels one after the other, close ones half a step from the truth."""
    x, y, gate, scale, shift = stream(layers=layers, dim=dim)
    place: Any = {"groups": [3, 10, 24], "token_offset": 2}

    def put(*given: Tensor) -> list[Tensor]:
        return [device.put(v) for v in given]

    def fused() -> EightBitRows:
        if which == "norm":
            return ops.norm_modulate_eight_bit(*put(x, scale, shift), kind, dtype=layers, contract=contract, **place)
        given = put(x, y, gate, scale, shift)
        return ops.gate_residual_norm_modulate_eight_bit(*given, kind, contract=contract, **place)[1]

    rows = emulated_rows(device, fused)
    if contract == "close":
        wide = [v.double() for v in (x, y, gate, scale, shift)]
        truth = ops.gate_residual_norm_modulate_reference(*wide, **place)[1]
        if which == "norm":
            truth = ops.norm_modulate_reference(wide[0], *wide[3:], **place)
        assert steps(rows, truth) <= 1 + 1e-2
        return
    if which == "norm":
        normal = ops.norm_modulate(*put(x, scale, shift), dtype=layers, **place)
    else:
        normal = ops.gate_residual_norm_modulate(*put(x, y, gate, scale, shift), dtype=layers, **place)[1]
    assert_same(rows, ops.quantise_rows_reference(normal, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 37])
def test_emulated_cuda_kernel_scales_sums(device: Device, dtype: torch.dtype, columns: int) -> None:
    sums = torch.randint(-(2**20), 2**20, (5, columns), dtype=torch.int32)
    scale, weight_scale, bias = torch.rand(5) * 1e-3, torch.rand(columns), torch.randn(columns)
    want = sums.double() * scale[:, None].double() * weight_scale.double() + bias.double()

    def run() -> list[Tensor]:
        out = torch.empty(sums.shape, dtype=dtype)
        given = [device.put(v) for v in (sums, scale, weight_scale, bias)]
        _eight_bit_library.native.rescale(*given, out)
        return [out]

    (out,) = device.orders(run)
    assert relative(out, want) < torch.finfo(dtype).eps


@pytest.mark.cuda
@kinds
@contracts
def test_cuda_agrees_with_unfused_cuda(kind: str, contract: str) -> None:
    x, y, gate, scale, shift = (v.cuda() for v in stream(dim=5120))
    place: Any = {"groups": GROUPS, "token_offset": 0}
    _, rows = ops.gate_residual_norm_modulate_eight_bit(x, y, gate, scale, shift, kind, contract=contract, **place)
    normal = ops.gate_residual_norm_modulate(x, y, gate, scale, shift, dtype=y.dtype, **place)[1]
    if contract == "exact":
        assert_same(rows, ops.quantise_rows(normal, kind))
        assert_same(ops.quantise_rows(y, kind, "gelu_tanh"), ops.quantise_rows(F.gelu(y, approximate="tanh"), kind))
    weight = ops.quantise_rows(torch.randn(256, 5120).cuda(), kind)
    got = ops.eight_bit_linear(rows, weight.codes, weight.scale)
    want = ops.eight_bit_linear_reference(rows._replace(dtype=torch.float64), weight.codes, weight.scale)
    assert relative(got, want) < 5e-3
