# SPDX-License-Identifier: Apache-2.0
"""The native module is there, says what it is, and its instruction sets agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import usable_isas

import talkingdit
from talkingdit import ops

ROOT = Path(__file__).resolve().parents[2]

# The small cases of every op that has benchmarks, and numbers that conversions have to get right.
RUN = """
import sys, torch
from bench.cases import small_cases
from talkingdit import ops
torch.manual_seed(0)
results = []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for case in small_cases(dtype, torch.device("cpu")):
        results += torch.utils._pytree.tree_leaves(case.op(*case.inputs))
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 65504.0, 6e-8, -0.0, 1e-40, 3.4e38])
    zero = torch.zeros(1, 1, 8)
    results.append(ops.gate_residual(special.to(dtype).view(1, 1, 8), zero.to(dtype), zero))
    numbers = torch.cat([torch.randn(64), special, torch.randn(56)]).to(dtype)  # some registers have only numbers
    places = ops.RopeLayout([ops.Segment(range(2), range(1), range(1))], split=(44, 42, 42))
    results.append(ops.rope3d(numbers.expand(1, 2, 1, 128), places))
torch.save(results, sys.argv[1])
"""


def run(isa: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TALKINGDIT_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", RUN, path], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_build_info_tells_what_is_in_use() -> None:
    info = talkingdit.build_info()
    assert info["version"] == talkingdit.__version__
    assert info["cpu_isa"] in info["cpu_isa_built"]
    assert info["threads"] == torch.get_num_threads()
    assert isinstance(info["cuda"], bool)
    if info["cuda"]:
        assert info["cuda_archs"]
        assert info["cuda_toolkit"]


def test_importing_the_package_loads_neither_torch_nor_kernels() -> None:
    code = "import sys, talkingdit; assert 'torch' not in sys.modules; talkingdit.ops; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ops_use_the_threads_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert talkingdit.build_info()["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_instruction_sets_agree(tmp_path) -> None:  # type: ignore[no-untyped-def]
    usable = usable_isas()
    results = {}
    for isa in usable:
        done = run(isa, str(tmp_path / isa))
        assert done.returncode == 0, done.stderr
        results[isa] = torch.load(tmp_path / isa)
    for isa in usable[1:]:
        for a, b in zip(results[isa], results["baseline"], strict=True):
            near = 16 * torch.finfo(a.dtype).eps
            typical = max(1.0, float(b[b.isfinite()].abs().median()))
            torch.testing.assert_close(a, b, rtol=near, atol=4 * near * typical, equal_nan=True)


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = run("mmx", "unused")
    assert done.returncode != 0
    assert "TALKINGDIT_CPU_ISA: expected baseline, avx2, avx512 or avx512_bf16, got 'mmx'" in done.stderr


def test_a_missing_native_module_is_one_clear_error() -> None:
    code = "import sys; sys.modules['talkingdit._native'] = None\nimport talkingdit.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: talkingdit's native module (talkingdit/_native) is not built for this Python" in done.stderr


def test_an_old_torch_is_one_clear_error() -> None:
    code = "import torch; del torch.Tensor.__dlpack_c_exchange_api__\nimport talkingdit.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: talkingdit needs torch >= 2.10" in done.stderr


@pytest.mark.skipif(talkingdit.build_info()["cuda"], reason="built with CUDA kernels")
def test_cuda_tensor_without_cuda_kernels_says_so() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.zeros(1, 1, 4, device="cuda")
    with pytest.raises(RuntimeError, match="built without CUDA kernels"):
        ops.gate_residual(x, x, x)


def test_the_native_functions_refuse_what_is_no_tensor() -> None:
    from talkingdit._native_loader import native

    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.qk_norm_rope3d_chunks("two")
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.fresh_result("two", 2, 32)
