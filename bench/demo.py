# SPDX-License-Identifier: Apache-2.0
"""The video of `make demo`, as a process of its own: processor time, time and peak memory, this build against another.

    python -m bench.demo [--old COMMIT] [--runs 5] [--busy] [--nice N] [--out bench/results]

Builds take turns, so that a machine that is slow for a while is slow for both. `--old` is checked out beside this tree,
with the kernels that this tree has. `--busy` adds a run of each turn beside a process that never waits. Before the
counted runs each build makes a short video, which writes its bytecode. The result says whether all videos were equal.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import record

_ROOT = Path(__file__).resolve().parent.parent
_SPIN = "while True: pass"
# A child's peak begins with the memory of the process that starts it, so that is a small one; and what the child takes
# is counted for it alone.
_COUNT = """
import os, sys
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime} {1024 * used.ru_maxrss}")
"""
# `python -m talkingdit` in a tree, also where another one is installed to be edited: such finders go before the folder.
_IN_TREE = """
import runpy, sys
from importlib.machinery import PathFinder
sys.meta_path.insert(0, PathFinder)
runpy.run_module("talkingdit", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class DemoRun:
    """What one process took. Seconds and bytes."""

    cpu: float  # of the user and of the system, all threads
    wall: float
    peak: int  # resident
    video: str  # digest


def command(tree: Path) -> list[str]:
    """What `make demo` of a tree runs, without --output and --sheet."""
    words = re.search(r'--prompt "([^"]*)"', (tree / "Makefile").read_text())
    assets = tree / "talkingdit" / "puppets" / "assets"
    files = ["--image", str(assets / "portrait.png"), "--audio", str(assets / "voice.flac")]
    return [sys.executable, "-m", "talkingdit", "generate", *files, "--prompt", words[1] if words else ""]


def measure(tree: Path, folder: Path, more: Sequence[str] = (), nice: int = 0) -> DemoRun:
    """Make the video of a tree.

    Raises:
        RuntimeError: the process ends with an error.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    output = folder / "demo.mp4"
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
    said = command(tree)[3:]  # behind python -m talkingdit
    words = [sys.executable, "-c", _IN_TREE, *said, "--output", str(output), "--sheet", str(folder / "demo.png"), *more]
    started = time.monotonic()
    with (folder / "log").open("wb") as log:
        counting = [sys.executable, "-I", "-S", "-c", _COUNT, str(folder / "taken")]
        slower = ["nice", "-n", str(nice)] if nice else []
        subprocess.run([*counting, *slower, *words], cwd=tree, env=kept, stdout=log, stderr=log, check=True)
    wall = time.monotonic() - started
    status, cpu, peak = (folder / "taken").read_text().split()
    if int(status):
        raise RuntimeError(f"{tree}: {(folder / 'log').read_text().strip()}")
    digest = hashlib.sha256(output.read_bytes()).hexdigest()[:16]
    return DemoRun(float(cpu), wall, int(peak), digest)


@contextlib.contextmanager
def checked_out(commit: str | None) -> Iterator[dict[str, Path]]:
    """Trees by name: this one, and a temporary one of a commit."""
    if commit is None:
        yield {"new": _ROOT}
        return
    with tempfile.TemporaryDirectory(prefix="talkingdit-bench-", dir=_ROOT.parent) as scratch:
        tree = Path(scratch) / "old"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=_ROOT, check=True)
        try:
            for native in (_ROOT / "talkingdit").glob("_native*.so"):
                shutil.copy2(native, tree / "talkingdit")
            yield {"old": tree, "new": _ROOT}
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=_ROOT, check=True)


@contextlib.contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """A process that never waits, or none."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-S", "-c", _SPIN])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def compare(trees: dict[str, Path], runs: int, busy: bool, nice: int, more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of the result: for each build, and each neighbourhood, its runs and their medians."""
    places = [(name, beside) for beside in ((False, True) if busy else (False,)) for name in trees]
    found: dict[tuple[str, bool], list[DemoRun]] = {place: [] for place in places}
    with tempfile.TemporaryDirectory() as scratch:
        for tree in trees.values():
            measure(tree, Path(scratch) / "video", ["--steps", "1"])
        for number in range(runs):
            for name, beside in places:
                with neighbour(beside):
                    run = measure(trees[name], Path(scratch) / "video", more, nice)
                found[name, beside].append(run)
                place = f"{number + 1}/{runs} {name}{', busy' if beside else ''}"
                print(f"{place}: {run.cpu:.1f} s of CPU, {run.wall:.1f} s, {run.peak / 1e6:.0f} MB", flush=True)
    return [
        {
            "build": name,
            "neighbour": "busy" if beside else "none",
            "cpu_s": statistics.median(run.cpu for run in taken),
            "wall_s": statistics.median(run.wall for run in taken),
            "peak_bytes": int(statistics.median(run.peak for run in taken)),
            "runs": [asdict(run) for run in taken],
        }
        for (name, beside), taken in found.items()
    ]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """New against old beside no neighbour, and busy against none of the new build."""
    by = {(row["build"], row["neighbour"]): row for row in rows}
    new, old, beside = by["new", "none"], by.get(("old", "none")), by.get(("new", "busy"))
    found: dict[str, float] = {}
    if old is not None:
        found |= {f"{name}_new_to_old": round(new[name] / old[name], 3) for name in ("cpu_s", "wall_s", "peak_bytes")}
    if beside is not None:
        found["wall_s_busy_to_none"] = round(beside["wall_s"] / new["wall_s"], 3)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--old", metavar="COMMIT", help="build to compare with")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each build (default: 5)")
    parser.add_argument("--busy", action="store_true", help="also beside a busy process")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="run at this lower priority")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON file (default: none is written)")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    with checked_out(options.old) as trees:
        rows = compare(trees, options.runs, options.busy, options.nice)
    result = record.header("demo", torch.device("cpu"), quick=False) | {
        "old": options.old,
        "nice": options.nice,
        "load_before": round(load, 2),
        "same_video": len({run["video"] for row in rows for run in row["runs"]}) == 1,
        "ratios": ratios(rows),
        "processes": rows,
    }
    print(json.dumps({name: result[name] for name in ("ratios", "same_video", "load_before")}))
    if options.out is not None:
        print(record.save(result, options.out, "cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
