# SPDX-License-Identifier: Apache-2.0
"""Fair timing: everybody warmed up, on the same inputs, in turns, in one run together with a plain copy.

A turn on the CPU is two calls, and the second is timed: caches and free memory are then as the same call left them, not
as another contestant did.

A row compares the op with a fresh result (``median_us``) and with a preallocated one (``out_us``), and baselines with
fresh results. ``bytes`` is what has to cross memory at least: every input read once, every result written once.
``copy_us`` is ``Tensor.copy_`` between two buffers that together hold as many bytes; ``share_of_copy`` is the op's
bandwidth as a share of the copy's.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import talkingdit

DTYPES = (torch.float32, torch.bfloat16)
_ROOT = Path(__file__).resolve().parent.parent
_CUDA_POOL = 256 << 20  # inputs rotate through this much memory, several times an L2 cache
_SECONDS = 1.5  # a contestant that used as much stops after a few samples
_FEW = 3
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Setting:
    """What a run was asked for."""

    device: torch.device
    quick: bool = False
    compile: bool = True


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        inputs: makes a fresh set of tensors.
        ours: the op, called as ``ours(*inputs)`` and, going forward, ``ours(*inputs, out=...)``.
        baselines: others of the same signature without ``out``.
        compiled: the baseline to compile, or None.
        direction: "backward" times the gradients of all inputs alone; "forward" and "step" time the call.
        has_out: whether the op takes a preallocated result.
    """

    op: str
    shape: str
    tokens: int
    dtype: torch.dtype
    direction: str
    bytes: int
    inputs: Callable[[], tuple[Tensor, ...]]
    ours: Callable[..., Any]
    baselines: Mapping[str, Callable[..., Any]]
    compiled: Callable[..., Any] | None = None
    has_out: bool = True


Call = Callable[[], Any]


def size(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def _like(value: Any) -> Any:
    return tree_map(torch.empty_like, value)


def _backward_call(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Call:
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = tree_leaves(function(*leaves))
    generator = torch.Generator(results[0].device).manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator, device=r.device, dtype=r.dtype) for r in results]
    return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)


def _forward_call(function: Callable[..., Any], inputs: tuple[Tensor, ...], **options: Any) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return function(*inputs, **options)

    return call


def _check(case: Case, calls: Mapping[str, Sequence[Call]]) -> None:
    """A comparison with something that computes another thing is worth nothing."""
    expected = [t.double() for t in tree_leaves(calls["ours"][0]())]
    for name, (call, *_) in calls.items():
        for ours, theirs in zip(expected, tree_leaves(call()), strict=True):
            error = float((theirs.double() - ours).norm() / ours.norm().clamp_min(1e-30))
            if not error < _TOLERANCE[case.dtype]:
                raise RuntimeError(
                    f"bench: {name} and {case.op} ({case.shape}, {case.dtype}, {case.direction}) must agree, "
                    f"got a relative difference of {error:.2g}"
                )


def contestants(case: Case, setting: Setting) -> dict[str, list[Call]]:
    """Calls by name, one per set of inputs; all contestants share the sets."""
    first = case.inputs()
    count = 1 if setting.device.type == "cpu" else min(16, math.ceil(_CUDA_POOL / size(*first)))
    sets = [first, *(case.inputs() for _ in range(count - 1))]
    functions = {"ours": case.ours, **case.baselines}
    if case.compiled is not None and setting.compile and not setting.quick:
        torch._dynamo.reset()
        functions["compile"] = torch.compile(case.compiled, fullgraph=True, dynamic=False)
    make = _backward_call if case.direction == "backward" else _forward_call
    calls = {name: [make(function, inputs) for inputs in sets] for name, function in functions.items()}
    _check(case, calls)
    if case.direction != "backward" and case.has_out:
        calls["out"] = [_forward_call(case.ours, inputs, out=_like(calls["ours"][0]())) for inputs in sets]
    pairs = [torch.rand(2, max(1, case.bytes // 8), device=setting.device).unbind(0) for _ in range(count)]
    calls["copy"] = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]  # type: ignore[misc]
    return calls


def _time(calls: Sequence[Call], device: torch.device) -> float:
    """Microseconds per call. Results are kept until the clock stops, so that each is a fresh one."""
    if device.type == "cpu":
        calls[0]()
        begin = time.perf_counter_ns()
        kept = [call() for call in calls]
        elapsed = (time.perf_counter_ns() - begin) / 1e3
    else:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)  # launches queue up behind it: the device is timed, not the host
        start.record()
        kept = [call() for call in calls]
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end) * 1e3
    del kept
    return elapsed / len(calls)


def measure(calls: Mapping[str, Sequence[Call]], setting: Setting) -> dict[str, list[float]]:
    """Samples in microseconds, taken in turns."""
    for group in calls.values():
        _time(group, setting.device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for _ in range(3 if setting.quick else 40):
        for name, group in calls.items():
            taken = samples[name]
            if len(taken) < _FEW or sum(taken) * len(group) < _SECONDS * 1e6:
                taken.append(_time(group, setting.device))
    return samples


def _peak_bytes(call: Call) -> int:
    """Device memory that one call needs on top of its inputs, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def run_case(case: Case, setting: Setting) -> dict[str, Any]:
    calls = contestants(case, setting)
    samples = measure(calls, setting)
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    ours = sorted(samples["ours"])
    median, copy = medians.pop("ours"), medians.pop("copy")
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "tokens": case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": case.direction,
        "bytes": case.bytes,
        "repeats": len(ours),
        "median_us": median,
        "p20_us": ours[round(0.2 * (len(ours) - 1))],
        "p80_us": ours[round(0.8 * (len(ours) - 1))],
        "gbps": case.bytes / median / 1e3,
        "share_of_copy": copy / median,
        "copy_us": copy,
    }
    if "out" in medians:
        warm = medians.pop("out")
        row.update(out_us=warm, out_gbps=case.bytes / warm / 1e3, out_share_of_copy=copy / warm)
    if setting.device.type == "cuda":
        row["peak_bytes"] = _peak_bytes(calls["ours"][0])
    row["baselines"] = medians
    return {name: _round(value) for name, value in row.items()}


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _round(inner) for name, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Of the repository, with "-dirty" for uncommitted changes of anything but results; "unknown" without git."""
    try:
        commit = subprocess.check_output(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=_ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()
        changed = subprocess.check_output(
            ["git", "status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!README.md"], cwd=_ROOT, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed.strip() else "")


def _cases(module: ModuleType, setting: Setting) -> Iterator[Case]:
    for shape in module.SHAPES["quick" if setting.quick else setting.device.type]:
        for dtype in DTYPES:
            yield from module.cases(shape, dtype, setting.device)


def run(name: str, module: ModuleType, setting: Setting) -> dict[str, Any]:
    """Runs the cases of one file of benchmarks (``SHAPES`` and ``cases``); prints rows to stderr as they come."""
    torch.manual_seed(0)
    functorch_config.donated_buffer = False  # graphs are kept and run backward many times
    rows = []
    for case in _cases(module, setting):
        row = run_case(case, setting)
        rows.append(row)
        others = "  ".join(f"{other} {us:.0f}" for other, us in row["baselines"].items())
        print(
            f"{row['op']:18} {row['shape']:22} {row['dtype']:9} {row['direction']:9} us: {row['median_us']:.0f}"
            f" (out {row.get('out_us', math.nan):.0f}, copy {row['copy_us']:.0f})  {others}",
            file=sys.stderr,
            flush=True,
        )
    build = talkingdit.build_info()
    cuda = setting.device.type == "cuda"
    versions = {
        "talkingdit": talkingdit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        "cpu_isa": build["cpu_isa"],
    }
    return {
        "name": name,
        "machine": f"{_cpu_name()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(setting.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": _commit(),
        "quick": setting.quick,
        "copy_gbps": _round(statistics.median(row["bytes"] / row["copy_us"] / 1e3 for row in rows)),
        "rows": rows,
    }


def write(path: Path, text: str) -> None:
    """All of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def save(result: Mapping[str, Any], folder: Path, device: str) -> Path:
    path = folder / f"{device}-{result['name']}.json"
    write(path, json.dumps(result, indent=1) + "\n")
    return path
