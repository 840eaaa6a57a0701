# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu --out DIR``: everything that needs a GPU, in ten minutes, what matters most first.

Correctness comes before speed: small cases against float64 (twice, bit by bit), the tests marked ``cuda``, CUDA graphs
and ``torch.compile(fullgraph=True)``, compute-sanitizer; then every op is measured with its baselines. Each step writes
its own JSON file when it ends, so that nothing is lost when time runs out; steps that no longer fit are left out and
named. ``--dry-run`` does on the CPU what can be done there, on tiny shapes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import talkingdit
from bench import harness
from bench.gpu_cases import DTYPES, SmallCase, small_cases

ORDER = ("rope3d", "qk_norm_rope3d", "modulate", "audio_attention", "window_fusion", "framepack", "frame_linear")
TOOLS = ("memcheck", "racecheck", "initcheck")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_ROOT = Path(__file__).resolve().parent.parent

Step = Callable[[torch.device, float], Any]


def _results(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Results and gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = tree_leaves(function(*leaves))
    generator = torch.Generator().manual_seed(1)
    probes = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, leaves, probes))]


def _error(case: SmallCase, dtype: torch.dtype) -> float:
    """Largest relative error of results and gradients; infinite if two runs differ or something was not written."""
    ours, again = _results(case.op, case.inputs), _results(case.op, case.inputs)
    truth = _results(case.reference, tuple(t.double() for t in case.inputs))
    if not all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(ours, again, strict=True)):
        return float("inf")
    return max(float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(ours, truth, strict=True))


def check_small(device: torch.device, seconds: float) -> dict[str, Any]:
    """Small cases against float64, twice. Freed memory is poisoned, so that what is not written is not a number."""
    failed, errors = [], {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        for case in small_cases(dtype, device):
            torch.full((1 << 22,), float("nan"), device=device)  # the allocator hands it out again
            name = f"{case.name} {dtype}"
            try:
                errors[name] = _error(case, dtype)
                if not errors[name] < TOLERANCE[dtype]:
                    failed.append(f"{name}: relative error {errors[name]:.2g}")
            except Exception as problem:
                failed.append(f"{name}: {problem}")
    return {"failed": failed, "errors": errors}


def check_tests(device: torch.device, seconds: float) -> dict[str, Any]:
    """Tests marked cuda."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    return _child(command, min(seconds, 120.0), good=(0, 5))  # 5: no such test


def check_graphs(device: torch.device, seconds: float) -> dict[str, Any]:
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
        if case.name.startswith(("rope3d 128", "norm_modulate 1536", "audio_attention 128")):
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


def check_sanitizer(device: torch.device, seconds: float) -> dict[str, Any]:
    """compute-sanitizer over the small cases in bfloat16."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"skipped": "compute-sanitizer was not found"}
    results: dict[str, Any] = {"failed": []}
    end = time.monotonic() + seconds
    for name in TOOLS:
        left = end - time.monotonic()
        if left < 10:
            results[name] = {"skipped": "no time left"}
            continue
        options = ["--tool", name, "--error-exitcode", "9", "--kernel-regex", "kns=td"]
        result = _child(
            [tool, *options, sys.executable, "-m", "bench.gpu", "--small-cases"], left / (3 - TOOLS.index(name))
        )
        results[name] = result
        results["failed"] += [f"{name}: {line}" for line in result["failed"]]
    return results


def _child(command: list[str], seconds: float, good: tuple[int, ...] = (0,)) -> dict[str, Any]:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": [], "skipped": f"stopped after {seconds:.0f} s"}
    tail = (done.stdout + done.stderr)[-4000:]
    return {"failed": [] if done.returncode in good else [f"exit status {done.returncode}"], "output": tail}


def _measure(name: str, quick: bool, compiled: bool) -> Step:
    def step(device: torch.device, seconds: float) -> Any:
        return harness.run(name, importlib.import_module(f"bench.{name}"), harness.Setting(device, quick, compiled))

    step.__doc__ = f"{name} and its baselines."
    return step


def run_steps(steps: dict[str, tuple[float, Step]], device: torch.device, out: Path, minutes: float) -> list[str]:
    """Runs steps (least seconds that make sense, function) in order; returns what failed or was left out."""
    end = time.monotonic() + 60 * minutes
    problems = []
    for name, (least, step) in steps.items():
        left = end - time.monotonic()
        if left < least:
            problems.append(f"{name}: left out, {left:.0f} s were left")
            continue
        begin = time.monotonic()
        try:
            result = step(device, left)
        except Exception:
            result = {"failed": [traceback.format_exc()]}
        harness.write(out / f"{name}.json", json.dumps(result, indent=1) + "\n")
        failed = result.get("failed", []) if isinstance(result, dict) else []
        problems += [f"{name}: {line}" for line in failed]
        skipped = f", skipped: {result['skipped']}" if isinstance(result, dict) and "skipped" in result else ""
        print(f"{name}: {time.monotonic() - begin:.1f} s, {len(failed)} failed{skipped}", flush=True)
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=_ROOT / "build" / "gpu", help="folder of the results"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="time for everything")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, nothing compiled")
    parser.add_argument("--small-cases", action="store_true", help="run the small cases once (below compute-sanitizer)")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("bench.gpu: no CUDA device was found; --dry-run does what can be done without", file=sys.stderr)
        return 1
    if not options.dry_run and not talkingdit.build_info()["cuda"]:
        print("bench.gpu: talkingdit was built without CUDA kernels", file=sys.stderr)
        return 1
    device = torch.device("cpu" if options.dry_run else "cuda")
    if options.small_cases:
        for case in small_cases(torch.bfloat16, device):
            _results(case.op, case.inputs)
        return 0
    steps: dict[str, tuple[float, Step]] = {
        "build": (0.0, lambda *_: talkingdit.build_info()),
        "small": (5.0, check_small),
        "graphs": (10.0, check_graphs),
        **{name: (20.0, _measure(name, options.dry_run, False)) for name in ORDER},
        "sanitizer": (30.0, check_sanitizer),
        "tests": (20.0, check_tests),
        **{f"compiled-{name}": (60.0, _measure(name, options.dry_run, True)) for name in ORDER if not options.dry_run},
    }
    problems = run_steps(steps, device, options.out, options.minutes)
    for line in problems:
        print(line)
    harness.write(options.out / "problems.json", json.dumps(problems, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
