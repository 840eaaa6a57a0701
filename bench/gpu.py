# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu --out DIR``: everything that needs a GPU, in ten minutes, what matters most first.

Correctness comes before speed: small cases against float64 (twice, bit by bit, and with poisoned memory),
more than 2^31 elements, CUDA graphs and ``torch.compile(fullgraph=True)``, the tests marked ``cuda``; then every op is
measured with its baselines, a whole block with its audio injection, a training step, compute-sanitizer, and last the
compiled baselines.

Each step is a process with a time limit of its own, so that no fault and no compiler takes the others' time, and writes
its JSON file as it goes: what it had when it was stopped is kept. Steps that no longer fit are left out and named.
``python -m bench report --out DIR`` makes a table of the ``cuda-*.json`` files. ``--dry-run`` does on the CPU what can
be done there, in one process, on tiny shapes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import talkingdit
from bench import block, harness, train_step
from bench.gpu_cases import DTYPES, SmallCase, large_cases, small_cases

ORDER = (
    "audio_attention",
    "qk_norm_rope3d",
    "rope3d",
    "modulate",
    "audio_block",
    "framepack",
    "window_fusion",
    "frame_linear",
)
TOOLS = ("memcheck", "racecheck", "initcheck")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_ROOT = Path(__file__).resolve().parent.parent

Write = Callable[[Any], None]


@dataclass(frozen=True)
class Step:
    """``run(device, seconds, write)`` gives what its file holds; it may write a part of that before.

    Attributes:
        cap: seconds after which it is stopped.
        file: name of its file, which the device's name may go before.
    """

    run: Callable[[torch.device, float, Write], Any]
    cap: float
    measures: str = ""

    def file(self, name: str, device: torch.device) -> str:
        return f"{device.type}-{self.measures}.json" if self.measures else f"{name}.json"


def _results(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Results and gradients."""
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


def _error(case: SmallCase, dtype: torch.dtype) -> float:
    """Largest relative error of results and gradients; infinite if two runs differ or something was not written."""
    ours, again = _results(case.op, case.inputs), _results(case.op, case.inputs)
    with poisoned():
        fresh = _results(case.op, case.inputs)
    truth = _results(case.reference, tuple(t.double() for t in case.inputs))
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
                errors[name] = _error(case, dtype)
                if not errors[name] < TOLERANCE[dtype]:
                    failed.append(f"{name}: relative error {errors[name]:.2g}")
            except Exception as problem:
                failed.append(f"{name}: {problem}")
    return {"failed": failed, "errors": errors}


def check_large(device: torch.device, seconds: float, write: Write) -> dict[str, Any]:
    """Batches of more than 2^31 elements: the last sample must be what it is alone."""
    failed = []
    for name, op, inputs in large_cases(device, tiny=device.type == "cpu"):
        try:
            with torch.no_grad():
                whole, alone = tree_leaves(op(*inputs)), tree_leaves(op(*(t[-1:] for t in inputs)))
            if not all(torch.equal(a[-1:], b) for a, b in zip(whole, alone, strict=True)):
                failed.append(f"{name}: the last sample of a large batch differs from the same sample alone")
            del whole, alone
        except Exception as problem:
            failed.append(f"{name}: {problem}")
    return {"failed": failed}


def check_tests(device: torch.device, seconds: float, write: Write) -> dict[str, Any]:
    """Tests marked cuda."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    # 5: no such test. It has to end before the process that it runs in is stopped.
    return _child(command, 0.85 * seconds, good=(0, 5))


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
        result = _child(
            [tool, *options, sys.executable, "-m", "bench.gpu", "--small-cases"], left / (3 - TOOLS.index(name))
        )
        results[name] = result
        results["failed"] += [f"{name}: {line}" for line in result["failed"]]
        write(results)
    return results


def _child(command: list[str], seconds: float, good: tuple[int, ...] = (0,)) -> dict[str, Any]:
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


def _setting(device: torch.device, seconds: float, compiled: bool | str) -> harness.Setting:
    """On a GPU bfloat16 alone, which is what models run in, with a quarter of a second for each contestant."""
    if device.type == "cpu":
        return harness.Setting(device, quick=True, compile=False)
    deadline = time.monotonic() + 0.9 * seconds
    return harness.Setting(
        device, compile=compiled, dtypes=(torch.bfloat16,), seconds=0.25, deadline=deadline, keep_going=True
    )


def _measure(name: str) -> Step:
    def run(device: torch.device, seconds: float, write: Write) -> Any:
        return harness.run(name, importlib.import_module(f"bench.{name}"), _setting(device, seconds, False), write)

    return Step(run, cap=60.0, measures=name)


def _measure_compiled(name: str) -> Step:
    """Our op and its compiled baselines, in a file of its own, which the report joins to the other."""

    def run(device: torch.device, seconds: float, write: Write) -> Any:
        return harness.run(name, importlib.import_module(f"bench.{name}"), _setting(device, seconds, "only"), write)

    return Step(run, cap=90.0, measures=f"{name}-compiled")


def _measure_block(device: torch.device, seconds: float, write: Write) -> Any:
    return block.run(_setting(device, seconds, False), write)


def _measure_training(device: torch.device, seconds: float, write: Write) -> Any:
    shape = train_step.SHAPES["14b-704x1024" if device.type == "cuda" else "tiny"]
    return train_step.run(shape, device, None, 3, ("off", "full") if device.type == "cuda" else ("full",))


def steps() -> dict[str, Step]:
    """In order of importance."""
    return {
        "build": Step(lambda *_: talkingdit.build_info(), cap=20.0),
        "small": Step(check_small, cap=60.0),
        "graphs": Step(check_graphs, cap=60.0),
        "large": Step(check_large, cap=30.0),
        "tests": Step(check_tests, cap=60.0),
        **{name: _measure(name) for name in ORDER[:4]},
        "block": Step(_measure_block, cap=90.0, measures="block"),
        "training": Step(_measure_training, cap=120.0, measures="train_step"),
        **{name: _measure(name) for name in ORDER[4:]},
        "sanitizer": Step(check_sanitizer, cap=90.0),
        **{f"compiled-{name}": _measure_compiled(name) for name in ORDER if name != "audio_block"},
    }


def run_step(name: str, step: Step, device: torch.device, out: Path, seconds: float) -> Any:
    """Runs a step in this process and writes its file."""
    path = out / step.file(name, device)
    path.unlink(missing_ok=True)

    def write(result: Any) -> None:
        harness.write(path, json.dumps(result, indent=1) + "\n")

    try:
        result = step.run(device, seconds, write)
    except Exception:
        result = json.loads(path.read_text()) if path.exists() else {}
        result["failed"] = [*result.get("failed", []), traceback.format_exc()]
    write(result)
    return result


def run_child(name: str, step: Step, device: torch.device, out: Path, seconds: float) -> Any:
    """Runs a step in a process that is stopped after `seconds`; gives what its file holds then."""
    path = out / step.file(name, device)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu", "--step", name, "--out", str(out), "--seconds", f"{seconds:.0f}"]
    ended = _child(command + (["--dry-run"] if device.type == "cpu" else []), seconds)
    result = json.loads(path.read_text()) if path.exists() else {"failed": [f"it wrote nothing: {ended['output']}"]}
    if "skipped" in ended:
        result["skipped"] = ended["skipped"]
        harness.write(path, json.dumps(result, indent=1) + "\n")
    return result


def run_steps(
    chosen: dict[str, Step],
    device: torch.device,
    out: Path,
    minutes: float,
    runner: Callable[..., Any] = run_child,
    least: float = 10.0,
) -> list[str]:
    """Runs steps in order while `least` seconds are left; returns what failed, was stopped or was left out."""
    end = time.monotonic() + 60 * minutes
    problems = []
    for name, step in chosen.items():
        begin = time.monotonic()
        if end - begin < least:
            problems.append(f"{name}: left out, {max(0.0, end - begin):.0f} s were left")
            continue
        result = runner(name, step, device, out, min(step.cap, end - begin))
        failed = result.get("failed", [])
        problems += [f"{name}: {line}" for line in failed]
        skipped = ""
        if "skipped" in result:
            skipped = f", {result['skipped']}"
            problems += [f"{name}: {result['skipped']}"] if device.type == "cuda" else []
        print(f"{name}: {time.monotonic() - begin:.1f} s, {len(failed)} failed{skipped}", flush=True)
    return problems


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=_ROOT / "build" / "gpu", help="folder of the results"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="time for everything")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, nothing compiled")
    parser.add_argument("--step", choices=list(steps()), help="one step alone, in this process")
    parser.add_argument("--seconds", type=float, default=60.0, help="time that one step has")
    parser.add_argument("--small-cases", action="store_true", help="run the small cases once (below compute-sanitizer)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
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
    chosen = steps()
    if options.step is not None:
        result = run_step(options.step, chosen[options.step], device, options.out.resolve(), options.seconds)
        return 1 if result.get("failed") else 0
    if options.dry_run:
        chosen = {name: step for name, step in chosen.items() if not name.startswith("compiled-")}
    runner = run_step if options.dry_run else run_child
    problems = run_steps(chosen, device, options.out.resolve(), options.minutes, runner)
    for line in problems:
        print(line)
    harness.write(options.out / "problems.json", json.dumps(problems, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
