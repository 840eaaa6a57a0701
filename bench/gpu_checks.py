# SPDX-License-Identifier: Apache-2.0
"""Is it right on a GPU? Steps of `bench.gpu` that compare the small and large cases of every op with what they must be.

A step is given a job (`bench.gpu_job`): its device, its seconds, and where it writes what it knows so far.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import cases, harness
from bench.cases import SmallCase, large_cases, small_cases
from bench.gpu_job import GpuJob, run_command

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TOOLS = ("memcheck", "racecheck", "initcheck")
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
    "launch__block_size",
)
TESTS = ("tests/ops", "tests/nn/test_attention.py")  # where tests marked cuda need nothing but torch and pytest


def results(function: Callable[..., Any], inputs: tuple[Tensor, ...], gradients: bool = True) -> list[Tensor]:
    """Results and, unless told otherwise, gradients."""
    if not gradients:
        with torch.no_grad():
            return tree_leaves(function(*inputs))
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = tree_leaves(function(*leaves))
    generator = torch.Generator().manual_seed(1)
    probes = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, leaves, probes))]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds what is not a number, so that what a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def error(case: SmallCase, dtype: torch.dtype) -> float:
    """Largest relative error of results and gradients; infinite if two runs differ or something was not written."""
    ours, again = results(case.op, case.inputs, case.gradients), results(case.op, case.inputs, case.gradients)
    with poisoned():
        fresh = results(case.op, case.inputs, case.gradients)
    truth = results(case.reference, tuple(t.double() for t in case.inputs), case.gradients)
    equal = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    if not equal or not all(t.isfinite().all() for t in (*ours, *fresh)):
        return float("inf")
    pairs = zip((*ours, *fresh), (*truth, *truth), strict=True)
    return max(float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def check_small(job: GpuJob) -> None:
    """Small cases against float64."""
    errors: dict[str, float] = {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        for case in small_cases(dtype, job.device):
            name = f"{case.name} {dtype}"
            try:
                errors[name] = error(case, dtype)
                if not errors[name] < TOLERANCE[dtype]:
                    job.failed.append(f"{name}: relative error {errors[name]:.2g}")
            except Exception as problem:
                job.failed.append(f"{name}: {problem}")
            job.write("small", {"failed": job.failed, "errors": errors})


def check_large(job: GpuJob) -> None:
    """Batches of more than 2^31 elements: the last sample must be what it is alone."""
    done = []
    for case in large_cases(job.device, tiny=job.device.type == "cpu"):
        try:
            with torch.no_grad():
                whole = tree_leaves(case.op(*case.inputs))
                alone = tree_leaves(case.op(*(t[-1:] for t in case.inputs)))
            if not all(torch.equal(a[-1:], b) for a, b in zip(whole, alone, strict=True)):
                job.failed.append(f"{case.name}: the last sample of a large batch differs from the same sample alone")
            del whole, alone
        except Exception as problem:
            job.failed.append(f"{case.name}: {problem}")
        done.append(case.name)
        job.write("large", {"failed": job.failed, "done": done})


def check_graphs(job: GpuJob) -> None:
    """Capture, replay with other inputs: the same as without a graph. And compiled without a break."""
    done: dict[str, list[str]] = {"captured": [], "compiled": []}
    for kind, check in (("captured", _replay_problem), ("compiled", _compile_problem)):
        for case in small_cases(torch.bfloat16, job.device):
            if kind == "compiled" and not case.compile:
                continue
            try:
                problem = check(case)
                job.failed += [f"{case.name}: {problem}"] if problem else []
            except Exception as error:
                job.failed.append(f"{case.name}, {kind}: {error}")
            done[kind].append(case.name)
            job.write("graphs", {"failed": job.failed, **done})


def _replay_problem(case: SmallCase) -> str:
    static = tuple(t.clone() for t in case.inputs)
    with torch.no_grad():
        case.op(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = tree_leaves(case.op(*static))
        fresh = [torch.rand_like(t) for t in static]
        for t, other in zip(static, fresh, strict=True):
            t.copy_(other)
        graph.replay()
        plain = tree_leaves(case.op(*fresh))
    same = all(torch.equal(a, b) for a, b in zip(captured, plain, strict=True))
    return "" if same else "a replayed graph gives something else"


def _compile_problem(case: SmallCase) -> str:
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = tree_leaves(torch.compile(case.op, fullgraph=True)(*case.inputs))
        plain = tree_leaves(case.op(*case.inputs))
    same = all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))
    return "" if same else "compiled, it gives something else"


def check_tests(job: GpuJob) -> None:
    """Tests marked cuda."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *TESTS]
    # 5: no such test. It has to end before the process that it runs in is stopped.
    result = run_command(command, 0.85 * job.seconds, good=(0, 5))
    job.failed += [f"{line}: {result['output'][-1500:]}" for line in result["failed"]]
    job.write("tests", result)


def check_sanitizer(job: GpuJob) -> None:
    """compute-sanitizer over the small cases in bfloat16."""
    tool = _cuda_tool("compute-sanitizer")
    if tool is None:
        job.skipped = "compute-sanitizer was not found"
        return
    results: dict[str, Any] = {}
    end = time.monotonic() + 0.85 * job.seconds
    for index, name in enumerate(TOOLS):
        left = end - time.monotonic()
        if left < 10:
            results[name] = {"skipped": "no time left"}
            continue
        # initcheck must see all who write, torch's kernels too; the others look at ours alone.
        ours = [] if name == "initcheck" else ["--kernel-regex", "kns=td"]
        command = [
            tool,
            "--tool",
            name,
            "--error-exitcode",
            "9",
            *ours,
            sys.executable,
            "-m",
            "bench.gpu",
            "--once",
            "small",
        ]
        results[name] = run_command(command, left / (len(TOOLS) - index))
        job.failed += [f"{name}: {line}" for line in results[name]["failed"]]
        job.write("sanitizer", results)


def read_counters(job: GpuJob) -> None:
    """Nsight Compute over one launch of every kernel at the first shapes, into ``counters.csv``."""
    tool = _cuda_tool("ncu")
    if tool is None:
        job.skipped = "ncu was not found"
        return
    which = ["--kernel-name-base", "mangled", "--kernel-id", "::regex:2td4cuda:1"]  # ours, the first launch of each
    shape = ["--csv", "--page", "raw", "--log-file", str(job.out / "counters.csv"), "--metrics", ",".join(COUNTERS)]
    command = [tool, "--clock-control", "none", *which, *shape, sys.executable, "-m", "bench.gpu", "--once", "first"]
    result = run_command(command, 0.95 * job.seconds)
    job.failed += [f"{line}: {result['output'][-1500:]}" for line in result["failed"]]
    job.skipped = result.get("skipped", "")


def run_once(which: str, device: torch.device) -> None:
    """Small cases, or the first shape of every op, in bfloat16, forward and backward: a program for profilers."""
    if which == "small":
        for small in small_cases(torch.bfloat16, device):
            results(small.op, small.inputs, small.gradients)
        return
    for name in cases.names():
        benchmark = cases.load(name)
        shapes = benchmark.shapes["cuda" if device.type == "cuda" else "quick"]
        for shape in () if benchmark.block else shapes[:1]:
            for case in benchmark.cases(shape, torch.bfloat16, device):
                make = harness.backward_call if case.direction == "backward" else harness.forward_call
                make(case.ours, case.inputs())()


def _cuda_tool(name: str) -> str | None:
    path = shutil.which(name) or f"/usr/local/cuda/bin/{name}"
    return path if Path(path).exists() else None
