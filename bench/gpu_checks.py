# SPDX-License-Identifier: Apache-2.0
"""Is it right on a GPU? Steps of `bench.gpu` that compare the small and large cases of every op with what they must be.

A step is called with a device, the seconds that it has, and a function that writes what it knows so far.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.cases import SmallCase, large_cases, small_cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TOOLS = ("memcheck", "racecheck", "initcheck")
_ROOT = Path(__file__).resolve().parent.parent

Write = Callable[[Any], None]


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


def check_small(device: torch.device, seconds: float, write: Write) -> dict[str, Any]:
    """Small cases against float64."""
    failed, errors = [], {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        for case in small_cases(dtype, device):
            name = f"{case.name} {dtype}"
            try:
                errors[name] = error(case, dtype)
                if not errors[name] < TOLERANCE[dtype]:
                    failed.append(f"{name}: relative error {errors[name]:.2g}")
            except Exception as problem:
                failed.append(f"{name}: {problem}")
    return {"failed": failed, "errors": errors}


def check_large(device: torch.device, seconds: float, write: Write) -> dict[str, Any]:
    """Batches of more than 2^31 elements: the last sample must be what it is alone."""
    failed = []
    for case in large_cases(device, tiny=device.type == "cpu"):
        try:
            with torch.no_grad():
                whole = tree_leaves(case.op(*case.inputs))
                alone = tree_leaves(case.op(*(t[-1:] for t in case.inputs)))
            if not all(torch.equal(a[-1:], b) for a, b in zip(whole, alone, strict=True)):
                failed.append(f"{case.name}: the last sample of a large batch differs from the same sample alone")
            del whole, alone
        except Exception as problem:
            failed.append(f"{case.name}: {problem}")
    return {"failed": failed}


def check_tests(device: torch.device, seconds: float, write: Write) -> dict[str, Any]:
    """Tests marked cuda."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    # 5: no such test. It has to end before the process that it runs in is stopped.
    return run_command(command, 0.85 * seconds, good=(0, 5))


def check_graphs(device: torch.device, seconds: float, write: Write) -> dict[str, Any]:
    """Capture, replay with other inputs: the same as without a graph. And compiled without a break."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    failed = []
    for case in small_cases(torch.bfloat16, device):
        try:
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
            if not all(torch.equal(a, b) for a, b in zip(captured, plain, strict=True)):
                failed.append(f"{case.name}: a replayed graph gives something else")
        except Exception as problem:
            failed.append(f"{case.name}: {problem}")
    for case in small_cases(torch.bfloat16, device):
        if case.compile:
            torch._dynamo.reset()
            try:
                with torch.no_grad():
                    compiled = tree_leaves(torch.compile(case.op, fullgraph=True)(*case.inputs))
                    if not all(
                        torch.equal(a, b) for a, b in zip(compiled, tree_leaves(case.op(*case.inputs)), strict=True)
                    ):
                        failed.append(f"{case.name}: compiled, it gives something else")
            except Exception as problem:
                failed.append(f"{case.name}, compiled: {problem}")
    return {"failed": failed}


def check_sanitizer(device: torch.device, seconds: float, write: Write) -> dict[str, Any]:
    """compute-sanitizer over the small cases in bfloat16."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"skipped": "compute-sanitizer was not found"}
    results: dict[str, Any] = {"failed": []}
    end = time.monotonic() + 0.85 * seconds
    for name in TOOLS:
        left = end - time.monotonic()
        if left < 10:
            results[name] = {"skipped": "no time left"}
            continue
        options = ["--tool", name, "--error-exitcode", "9", "--kernel-regex", "kns=td"]
        result = run_command(
            [tool, *options, sys.executable, "-m", "bench.gpu", "--small-cases"], left / (3 - TOOLS.index(name))
        )
        results[name] = result
        results["failed"] += [f"{name}: {line}" for line in result["failed"]]
        write(results)
    return results


def run_command(command: list[str], seconds: float, good: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Runs a command; when its time is up, it and all that it started are ended."""
    process = subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return {"failed": [], "skipped": f"stopped after {seconds:.0f} s", "output": output[-4000:]}
    failed = [] if process.returncode in good else [f"exit status {process.returncode}"]
    return {"failed": failed, "output": output[-4000:]}
