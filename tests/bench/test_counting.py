# SPDX-License-Identifier: Apache-2.0
"""What is counted about a block: bytes that operators move, and kernels by kind."""

from __future__ import annotations

import pytest
import torch

from bench import block, counted_block, harness, wan_block
from bench.kernel_kinds import kind, summary
from bench.traffic import Traffic
from talkingdit import ops


@pytest.mark.parametrize(
    ("call", "moved"),
    [
        (lambda x: x + x[:1], 100 * 4 * 2 + 10 * 4),  # reads x and one row, writes a result
        (lambda x: x.view(-1)[10:].transpose(0, 0), 0),  # views
        (lambda x: x.chunk(2), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x.add_(1), 100 * 4 * 2),
        (lambda x: x.copy_(torch.ones(()).expand(10, 10)), 4 + 4 + 100 * 4),  # makes one number, reads it, writes x
        (lambda x: torch.mm(x, x), 100 * 4 * 3),
        (lambda x: ops.gate_residual(x[None], x[None], x[None, :1]), 100 * 4 * 3 + 40),
    ],
)
def test_operators_read_arguments_and_write_results_once(call, moved):
    x = torch.rand(10, 10)
    with Traffic() as traffic:
        call(x)
    assert traffic.moved == moved


def test_a_result_written_in_place_by_our_ops_is_not_read():
    x, y = torch.rand(1, 8, 16), torch.rand(1, 8, 16)
    gate, scale, shift = (torch.rand(1, 1, 16) for _ in range(3))
    out = torch.empty_like(x), torch.empty_like(x)
    with Traffic() as fresh:
        ops.gate_residual_norm_modulate(x, y, gate, scale, shift)
    with Traffic() as given:
        ops.gate_residual_norm_modulate(x, y, gate, scale, shift, out=out)
    assert given.moved == fresh.moved


def test_a_block_is_counted_by_operator_in_both_programs():
    """The same matrix products; the rest moves less than half of what it moves officially."""
    found = counted_block.count(wan_block.SHAPES["tiny"])
    official, ours = found["official"], found["ours"]
    assert sum(official["bytes"].values()) > sum(ours["bytes"].values())
    assert ours["memory_bound_bytes"] < 0.5 * official["memory_bound_bytes"]
    assert 0.8 < ours["operations"] / official["operations"] < 1.01  # text and history are not encoded in every step
    assert "| bound by memory, GB |" in counted_block.table(found)
    fp8, narrow = found["ours, fp8"], found["ours, 16-bit stream"]
    assert fp8["operations"] == ours["operations"]
    assert fp8["bytes"]["talkingdit::eight_bit_linear"] < ours["bytes"]["aten::addmm"]
    assert "talkingdit::gate_residual_norm_modulate_eight_bit_out" in fp8["bytes"]
    assert narrow["memory_bound_bytes"] < ours["memory_bound_bytes"]
    assert narrow["operations"] == ours["operations"]
    assert "aten::copy_" not in ours["bytes"]  # slices of the feed-forward are written where their tokens were
    gelu = ours["bytes"]["talkingdit::gelu_tanh_"]
    fused = found["ours, 16-bit stream, GELU in the product"]
    assert narrow["memory_bound_bytes"] - fused["memory_bound_bytes"] == gelu
    assert sum(narrow["bytes"].values()) - sum(fused["bytes"].values()) == gelu
    assert fused["operations"] == narrow["operations"]


def test_a_wrong_block_is_no_contestant(monkeypatch):
    """In float8 it is left out with its error, and the others are measured; ours as it is by default ends the run."""
    right, tiny = block._Ours.contestant, wan_block.SHAPES["tiny"]
    setting = harness.Setting(torch.device("cpu"), quick=True)

    def wrong(fp8):
        def made(self, variant, heard):
            found = right(self, variant, heard)
            return found._replace(run=lambda x: 2 * x) if variant.fp8 == fp8 else found

        return made

    monkeypatch.setattr(block._Ours, "contestant", wrong(True))
    entry = block.measure(tiny, setting, [block.BlockVariant(), block.BlockVariant(fp8=True)])
    assert "must agree with the official block within 0.2, got" in entry["left_out"]["ours, fp8"]
    assert "ours, fp8" not in entry
    assert entry["ours"]["error"] < 1e-4
    monkeypatch.setattr(block._Ours, "contestant", wrong(False))
    with pytest.raises(RuntimeError, match=r"ours must agree with the official block within 0\.0001"):
        block.measure(tiny, setting, [block.BlockVariant()])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void td::rope3d_kernel<__nv_bfloat16, 8>(td::RopeArgs)", "talkingdit"),
        ("void talkingdit::audio_attention_forward<128>(Params)", "talkingdit"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>(Flash_fwd_params)", "attention"),
        ("void qk_int_sv_f8_attn_kernel<128u, 64u, 32u, 64u, 128u>", "attention"),  # SageAttention's
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "matrix product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix product"),
        ("void at::native::vectorized_layer_norm_kernel<float, float>(int, float)", "norm"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copy"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "elementwise"),
        ("something else", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name, expected):
    assert kind(name) == expected


def test_a_profile_sums_up_by_kind():
    x = torch.rand(256, 256)
    result = summary(lambda: torch.mm(x, x) + 1, torch.device("cpu"), calls=2)
    assert next(iter(result["kinds_us"])) == "matrix product"
    assert "aten::mm" in result["longest_us"]
