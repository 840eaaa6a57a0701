# SPDX-License-Identifier: Apache-2.0
"""Fair timing: everybody warmed up, on the same inputs, in turns, in one run together with a plain copy.

A turn on the CPU is two calls, and the second is timed: caches and free memory are then as the same call left them, not
as another contestant did. For memory that takes more: what one contestant frees, the C library may give to another,
whose large result then costs no page faults, as it would in a program of its own. So in full runs each has a process of
its own (`bench.apart`). A turn on a GPU is timed with events, over calls on several sets of inputs with results of
their own that together are several times its L2 cache, and the cache is overwritten before it.

A row compares the op with a fresh result (``median_us``) and with a preallocated one (``out_us``), and baselines with
fresh results. ``bytes`` is what has to cross memory at least: every input read once, every result written once.
``copy_us`` is ``Tensor.copy_`` between two buffers that together hold as many bytes; ``share_of_copy`` is the op's
bandwidth as a share of the copy's.
"""

from __future__ import annotations

import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bench.apart import Apart, Timed
from bench.cases import Benchmark, Case, size
from bench.record import header

DTYPES = (torch.float32, torch.bfloat16)
_CUDA_POOL = 256 << 20  # inputs rotate through this much memory at least, and through four L2 caches
_MOST_SETS = 64
_FEW = 3
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Setting:
    """What a run was asked for.

    Attributes:
        quick: tiny shapes, three samples, nothing compiled.
        compile: also compiled baselines; "only" leaves out the others.
        dtypes: in order.
        seconds: a contestant that used as much stops after a few samples.
        deadline: of `time.monotonic`; cases that would begin later are left out, and named in the result.
        keep_going: what fails is left out and named too.
        shapes: which of a benchmark's, as a slice of their list.
        apart: every contestant in a process of its own; on the CPU, for benchmarks that are files of this folder.
    """

    device: torch.device
    quick: bool = False
    compile: bool | str = True
    dtypes: tuple[torch.dtype, ...] = DTYPES
    seconds: float = 1.5
    deadline: float = math.inf
    keep_going: bool = False
    shapes: slice = field(default_factory=lambda: slice(None))
    apart: bool = False


Call = Callable[[], Any]


def _like(value: Any) -> Any:
    return tree_map(torch.empty_like, value)


def backward_call(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Call:
    """Gradients of all inputs, over and over from one forward pass."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = tree_leaves(function(*leaves))
    generator = torch.Generator(results[0].device).manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator, device=r.device, dtype=r.dtype) for r in results]
    return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)


def forward_call(function: Callable[..., Any], inputs: tuple[Tensor, ...], **options: Any) -> Call:
    """The function without gradients."""

    def call() -> Any:
        with torch.no_grad():
            return function(*inputs, **options)

    return call


def _check(case: Case, name: str, expected: Sequence[Tensor], call: Call) -> None:
    """A comparison with something that computes another thing is worth nothing."""
    for ours, theirs in zip(expected, tree_leaves(call()), strict=True):
        error = float((theirs.double() - ours).norm() / ours.norm().clamp_min(1e-30))
        if not error < _TOLERANCE[case.dtype] + case.rounding:
            raise RuntimeError(
                f"bench: {name} and {case.op} ({case.shape}, {case.dtype}, {case.direction}) must agree, "
                f"got a relative difference of {error:.2g}"
            )


def _compiled(case: Case, setting: Setting) -> dict[str, Callable[..., Any]]:
    if not setting.compile or setting.quick:
        return {}
    torch._dynamo.reset()
    # In the default mode: tuning thirty cases takes longer than measuring them, and graphs of its own would hide
    # launches for one contestant alone.
    functions = {} if case.compiled is None else {"compile": case.compiled}
    if setting.device.type == "cuda":
        functions |= case.fused
    return {name: torch.compile(function, fullgraph=True, dynamic=False) for name, function in functions.items()}


def sets_of_inputs(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of so many bytes keep a GPU from finding one in its cache."""
    if device.type == "cpu":
        return 1
    pool = max(_CUDA_POOL, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return min(_MOST_SETS, math.ceil(pool / nbytes))


def contestants(case: Case, setting: Setting, left_out: dict[str, str] | None = None) -> dict[str, list[Call]]:
    """Calls by name, one per set of inputs; all contestants share the sets.

    What an optional baseline (with `keep_going`: any) fails with is written to `left_out`, by its name.
    """
    left_out = {} if left_out is None else left_out
    first = case.inputs()
    count = sets_of_inputs(size(*first), setting.device)
    sets = [first, *(case.inputs() for _ in range(count - 1))]
    compiled = _compiled(case, setting)
    plain = {} if setting.compile == "only" else {**case.baselines, **case.optional}
    make = _maker(case)
    calls: dict[str, list[Call]] = {"ours": [make(case.ours, inputs) for inputs in sets]}
    expected = [t.double() for t in tree_leaves(calls["ours"][0]())]
    for name, function in {**plain, **compiled}.items():
        try:
            made = [make(function, first)]
            _check(case, name, expected, made[0])
            calls[name] = made + [make(function, inputs) for inputs in sets[1:]]
        except Exception as problem:
            cuda_compiled = name in compiled and setting.device.type == "cuda"
            if not (setting.keep_going or name in case.optional or cuda_compiled):
                raise
            left_out[name] = f"{type(problem).__name__}: {problem}"[:300]
    del expected
    return calls | _preallocated(case, setting, sets)


def calls_alone(case: Case, setting: Setting, name: str) -> dict[str, list[Call]]:
    """The calls of one contestant on the CPU; with ours, those whose results are there already."""
    make, inputs = _maker(case), case.inputs()
    if name == "ours":
        return {name: [make(case.ours, inputs)]} | _preallocated(case, setting, [inputs])
    function = (_compiled(case, setting) | {**case.baselines, **case.optional})[name]
    return {name: [make(function, inputs)]}


def _maker(case: Case) -> Callable[..., Call]:
    return backward_call if case.direction == "backward" else forward_call


def _preallocated(case: Case, setting: Setting, sets: Sequence[tuple[Tensor, ...]]) -> dict[str, list[Call]]:
    """Ours into a given result, where it takes one, and the copy."""
    calls: dict[str, list[Call]] = {}
    if case.direction != "backward" and case.has_out:
        calls["out"] = [forward_call(case.ours, inputs, out=_like(case.ours(*inputs))) for inputs in sets]
    pairs = [torch.rand(2, max(1, case.bytes // 8), device=setting.device).unbind(0) for _ in sets]
    calls["copy"] = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]  # type: ignore[misc]
    return calls


def time_calls(calls: Sequence[Call], device: torch.device, scratch: Tensor) -> Timed:
    """Per call. Results are kept until the clock stops, so that each is a fresh one."""
    if device.type == "cpu":
        calls[0]()
        before = _page_faults()
        begin = time.perf_counter_ns()
        kept = [call() for call in calls]
        elapsed = (time.perf_counter_ns() - begin) / 1e3
        faults = _page_faults() - before
    else:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        scratch.zero_()
        # Launches queue up behind it: the device is timed, not the host.
        torch.cuda._sleep(2_000_000 * (1 + len(calls) // 4))
        start.record()
        kept = [call() for call in calls]
        end.record()
        end.synchronize()
        elapsed, faults = start.elapsed_time(end) * 1e3, 0
    del kept
    return Timed(elapsed / len(calls), faults)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(calls: Mapping[str, Sequence[Call]], setting: Setting) -> dict[str, list[float]]:
    """Samples in microseconds, taken in turns in this process."""
    cuda = setting.device.type == "cuda"
    cache = torch.cuda.get_device_properties(setting.device).L2_cache_size if cuda else 0
    scratch = torch.empty(2 * cache, dtype=torch.uint8, device=setting.device)
    timers = {name: partial(time_calls, group, setting.device, scratch) for name, group in calls.items()}
    taken = _turns(timers, {name: len(group) for name, group in calls.items()}, setting)
    return {name: [timed.us for timed in samples] for name, samples in taken.items()}


def _turns(
    timers: Mapping[str, Callable[[], Timed]], calls: Mapping[str, int], setting: Setting
) -> dict[str, list[Timed]]:
    """Samples by contestant, who makes so many calls for one."""
    for timer in timers.values():
        timer()
    samples: dict[str, list[Timed]] = {name: [] for name in timers}
    gc.collect()
    for _ in range(3 if setting.quick else 40):
        for name, timer in timers.items():
            taken = samples[name]
            if len(taken) < _FEW or sum(timed.us for timed in taken) * calls[name] < setting.seconds * 1e6:
                taken.append(timer())
    return samples


def _measure_apart(
    benchmark: str, number: int, names: Sequence[str], setting: Setting
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Samples in microseconds and medians of page faults, of contestants in processes of their own."""
    with Apart(benchmark, number, names, setting) as timers:
        taken = _turns(timers, dict.fromkeys(timers, 1), setting)
    faults = {name: statistics.median(timed.page_faults for timed in samples) for name, samples in taken.items()}
    return {name: [timed.us for timed in samples] for name, samples in taken.items()}, faults


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of ordered samples, the nearest one."""
    return ordered[round(share * (len(ordered) - 1))]


def _peak_bytes(call: Call) -> int:
    """Device memory that one call needs on top of its inputs, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def run_case(case: Case, setting: Setting, benchmark: str = "", number: int = 0) -> dict[str, Any]:
    """A row. `benchmark` and the number of the case in it are for contestants in processes of their own."""
    left_out: dict[str, str] = {}
    calls = contestants(case, setting, left_out)
    faults: dict[str, float] = {}
    if setting.apart:
        names = [name for name in calls if name not in ("out", "copy")]
        calls.clear()  # agreed on; the memory is theirs
        samples, faults = _measure_apart(benchmark, number, names, setting)
    else:
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
        "p20_us": quantile(ours, 0.2),
        "p80_us": quantile(ours, 0.8),
        "gbps": case.bytes / median / 1e3,
        "share_of_copy": copy / median,
        "copy_us": copy,
    }
    if "out" in medians:
        warm = medians.pop("out")
        row.update(out_us=warm, out_gbps=case.bytes / warm / 1e3, out_share_of_copy=copy / warm)
    if setting.device.type == "cuda":
        row.update(peak_bytes=_peak_bytes(calls["ours"][0]), sets=len(calls["ours"]))
    if left_out:
        row["left_out"] = left_out
    if faults:
        row["page_faults"] = faults
    row["baselines"] = medians
    return {name: _round(value) for name, value in row.items()}


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _round(inner) for name, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def cases_of(benchmark: Benchmark, setting: Setting) -> Iterator[Case]:
    for shape in benchmark.shapes["quick" if setting.quick else setting.device.type][setting.shapes]:
        for dtype in setting.dtypes:
            yield from benchmark.cases(shape, dtype, setting.device)


def prepare() -> None:
    """The state of a process that times contestants."""
    torch.manual_seed(0)
    functorch_config.donated_buffer = False  # graphs are kept and run backward many times


def run(
    name: str, benchmark: Benchmark, setting: Setting, progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Runs the cases of one file of benchmarks; prints rows to stderr as they come.

    ``progress`` is given the result after every row.
    """
    prepare()
    result: dict[str, Any] = {**header(name, setting.device, setting.quick), "copy_gbps": math.nan, "rows": []}
    rows, problems = result["rows"], []
    for number, case in enumerate(cases_of(benchmark, setting)):
        label = f"{case.op} {case.shape} {str(case.dtype).removeprefix('torch.')} {case.direction}"
        if time.monotonic() > setting.deadline:
            problems.append(f"{label}: no time was left")
            continue
        try:
            row = run_case(case, setting, name, number)
        except Exception as problem:
            if not setting.keep_going:
                raise
            problems.append(f"{label}: {type(problem).__name__}: {problem}"[:500])
            continue
        rows.append(row)
        result["copy_gbps"] = _round(statistics.median(row["bytes"] / row["copy_us"] / 1e3 for row in rows))
        others = "  ".join(f"{other} {us:.0f}" for other, us in row["baselines"].items())
        print(
            f"{row['op']:18} {row['shape']:22} {row['dtype']:9} {row['direction']:9} us: {row['median_us']:.0f}"
            f" (out {row.get('out_us', math.nan):.0f}, copy {row['copy_us']:.0f})  {others}",
            file=sys.stderr,
            flush=True,
        )
        if progress is not None:
            progress(result)
    if problems:
        result["failed"] = problems
    return result
