# SPDX-License-Identifier: Apache-2.0
"""Every op of this build against the same op of another one, in turns: has one become slower?

    python -m bench.before --old DIR [op ...] [--rounds 4] [--samples 10] [--quick] [--out bench/results]

DIR is a tree with kernels of its own that were built in it. Each build runs in a process of its own, which waits while
the other one computes. A turn is two calls, and the second is timed. How fast a process is at large tensors depends on
the pages that it was given (the same build, started again, may take three times as long), so both use large pages, and
those that they have again (`MEMORY`), and there are rounds, each with new processes, in which builds begin in turns.
Good and bad times of the machine last for minutes and are both builds': the medians of a round are compared, and a row
tells the median over the rounds of how they compare. Cases are those of `python -m bench`, as far as both trees have
them by the same name.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch

from bench import cases, record
from bench.demo import name_of

_ROOT = Path(__file__).resolve().parent.parent
_REST = 0.005  # seconds in which the threads of the process that was timed go to sleep
_SECONDS = 3.0  # a case that has used as much stops after a few samples
_FEW = 5
# Of glibc: results come from the heap, which is never given back, in large pages.
MEMORY = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("mmap_max=0", f"trim_threshold={1 << 34}", f"top_pad={1 << 28}", "hugetlb=1")
)
# What a build's process does: "cases OP", "open NUMBER" and "time" on its input, a line of JSON for each on its output.
# It runs with the benchmarks of either tree, so it takes what these have had from the beginning.
_WORKER = """
import importlib, json, sys, time
from importlib.machinery import PathFinder
sys.meta_path.insert(0, PathFinder)
import torch
from bench import harness
torch.set_num_threads(int(sys.argv[1]))
setting = harness.Setting(torch.device("cpu"), sys.argv[2] == "quick", False)
forward = getattr(harness, "forward_call", None) or harness._forward_call
backward = getattr(harness, "backward_call", None) or harness._backward_call
found = getattr(harness, "cases_of", None) or harness._cases
def load(name):
    try:
        from bench import cases
        return cases.load(name)
    except ImportError:
        return importlib.import_module("bench." + name)
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    if word == "cases":
        torch.manual_seed(0)
        known = list(found(load(rest), setting))
        said = [[c.op, c.shape, str(c.dtype).removeprefix("torch."), c.direction] for c in known]
    elif word == "open":
        case = known[int(rest)]
        call = (backward if case.direction == "backward" else forward)(case.ours, case.inputs())
        said = None
    else:
        call()
        begin = time.perf_counter_ns()
        kept = call()
        said = (time.perf_counter_ns() - begin) / 1e3
        del kept
    print(json.dumps(said), flush=True)
"""


class Build:
    """The process that runs the ops of a tree."""

    def __init__(self, tree: Path, threads: int, quick: bool) -> None:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        kept["GLIBC_TUNABLES"] = MEMORY
        words = [sys.executable, "-c", _WORKER, str(threads), "quick" if quick else "whole"]
        self.process = subprocess.Popen(
            words, cwd=tree, env=kept, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.tree = tree
        self._in, self._out = cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)

    def ask(self, words: str) -> Any:
        """What the process answers.

        Raises:
            RuntimeError: it has ended.
        """
        print(words, file=self._in, flush=True)
        line = self._out.readline()
        if not line:
            raise RuntimeError(f"{self.tree}: the process ended at {words!r}")
        return json.loads(line)

    def close(self) -> None:
        self._in.close()
        self.process.wait()
        self._out.close()


Key = tuple[str, str, str, str]  # op, shape, dtype, direction


def compare(builds: dict[str, Build], op: str, samples: int) -> dict[Key, dict[str, float]]:
    """Medians in microseconds by build, of every case of an op that all builds have."""
    places = {
        name: {tuple(case): i for i, case in enumerate(build.ask(f"cases {op}"))} for name, build in builds.items()
    }
    found: dict[Key, dict[str, float]] = {}
    for key in places["new"]:
        if any(key not in known for known in places.values()):
            continue
        for name, build in builds.items():
            build.ask(f"open {places[name][key]}")
        taken: dict[str, list[float]] = {name: [] for name in builds}
        used = 0.0
        while len(taken["new"]) < (samples if used < _SECONDS else min(samples, _FEW)):
            begin = time.monotonic()
            for name, build in builds.items():
                taken[name].append(build.ask("time"))
                time.sleep(_REST)
            used += time.monotonic() - begin
        found[key] = {name: statistics.median(values) for name, values in taken.items()}
        told = "  ".join(f"{name} {median:.0f}" for name, median in found[key].items())
        print(" ".join(key), "us:", told, file=sys.stderr, flush=True)
    return found


def rows_of(rounds: Sequence[dict[Key, dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for every case, over all rounds."""
    rows = []
    for key in rounds[0]:
        old, new = (statistics.median(found[key][name] for found in rounds) for name in ("old", "new"))
        ratio = statistics.median(found[key]["new"] / found[key]["old"] for found in rounds)
        rows.append(
            dict(zip(("op", "shape", "dtype", "direction"), key, strict=True))
            | {"old_us": float(f"{old:.4g}"), "new_us": float(f"{new:.4g}"), "new_to_old": round(ratio, 3)}
            | {f"{name}_rounds_us": [float(f"{found[key][name]:.4g}") for found in rounds] for name in ("old", "new")}
        )
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean of an op's ratios, and the largest one."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["op"], []).append(row["new_to_old"])
    return {
        op: {
            "cases": len(ratios),
            "mean": round(math.exp(statistics.fmean(map(math.log, ratios))), 3),
            "largest": max(ratios),
        }
        for op, ratios in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.before", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help="(default: all)")
    parser.add_argument("--old", type=Path, required=True, metavar="DIR", help="tree of the other build")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="with new processes (%(default)s)")
    parser.add_argument("--samples", type=int, default=10, metavar="N", help="of each case in a round (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON file (default: none is written)")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(cases.names()):
        parser.error(f"expected some of {', '.join(cases.names())}, got {', '.join(sorted(unknown))}")
    trees = {"old": options.old.resolve(), "new": _ROOT}
    chosen = [op for op in options.ops or cases.names() if (trees["old"] / "bench" / f"{op}.py").is_file()]
    load = os.getloadavg()[0]
    rounds: list[dict[Key, dict[str, float]]] = []
    for number in range(options.rounds):
        order = list(trees) if number % 2 else list(reversed(trees))  # the first one finds more large pages
        builds = {name: Build(trees[name], options.threads, options.quick) for name in order}
        try:
            rounds.append({})
            for op in chosen:
                rounds[-1] |= compare(builds, op, options.samples)
        finally:
            for build in builds.values():
                build.close()
    rows = rows_of(rounds)
    result = record.header("before", torch.device("cpu"), options.quick) | {
        "threads": options.threads,  # of the processes that compute
        "old": name_of(str(options.old)),
        "load_before": round(load, 2),
        "ops": summary(rows),
        "rows": rows,
    }
    print(json.dumps(result["ops"], indent=1))
    if options.out is not None:
        print(record.save(result, options.out, "cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
