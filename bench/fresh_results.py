# SPDX-License-Identifier: Apache-2.0
"""audio_attention with a fresh result against SDPA, run after run, also where the machine's memory is in pieces.

    python -m bench.fresh_results [--runs 10] [--out bench/results/cpu-fresh_results.json]

The first touch of a large result is a page fault per page, which can take longer than the attention itself; how many
there are depends on what the process and the machine have done before. So each run is a process of its own, and before
every other one most of the free memory is taken page by page and every second page given back: no huge page is left.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import record
from bench.audio_baselines import sdpa
from bench.shapes import TOKENS, TokenShape
from talkingdit import ops

_RESULTS = Path(__file__).resolve().parent / "results" / "cpu-fresh_results.json"
_ROOT = Path(__file__).resolve().parent.parent
_REPEATS = 40
_TAKEN = 0.7  # of the free memory


def in_pieces(size: int) -> mmap.mmap:
    """Memory of which every second page is held, and the others were given back to the machine; keep it."""
    held, page = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), mmap.PAGESIZE
    held.madvise(mmap.MADV_NOHUGEPAGE)
    np.frombuffer(held, np.uint8)[::page] = 1
    for at in range(0, size - page, 2 * page):
        held.madvise(mmap.MADV_DONTNEED, at, page)
    return held


def free_bytes() -> int:
    """What the machine can give without swapping (Linux)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def measure(shape: TokenShape, repeats: int) -> dict[str, float]:
    """Medians in microseconds, in turns; of two calls of a turn the second counts, as in `bench.harness`."""
    frames, height, width = shape.video
    q = torch.randn(1, frames * height * width, shape.heads, shape.dim, dtype=torch.bfloat16)
    k, v = (torch.randn(1, frames, shape.audio, shape.heads, shape.dim, dtype=torch.bfloat16) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: ops.audio_attention(q, k, v, height * width),
        "sdpa": lambda: sdpa(q, k, v),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            begin = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - begin))
    ours, theirs = (statistics.median(times[name]) for name in ("ours", "sdpa"))
    return {"ours_us": round(ours, 1), "sdpa_us": round(theirs, 1), "ratio": round(theirs / ours, 2)}


def run(runs: int, repeats: int, shape: str, taken: float) -> list[dict[str, Any]]:
    """Rows, every second one of a machine whose memory is in pieces."""
    rows = []
    for number in range(runs):
        held = in_pieces(int(taken * free_bytes())) if number % 2 else None
        command = [sys.executable, "-m", "bench.fresh_results", "--once", shape, "--repeats", str(repeats)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=_ROOT)
        rows.append({"in_pieces": held is not None, **json.loads(done.stdout)})
        del held
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fresh_results", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, metavar="N")
    parser.add_argument("--repeats", type=int, default=_REPEATS, metavar="N", help="of a run")
    parser.add_argument("--shape", choices=["cpu", "quick"], default="cpu", help="of bench.shapes")
    parser.add_argument("--taken", type=float, default=_TAKEN, metavar="PART", help="of the free memory, in pieces")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    parser.add_argument("--once", choices=["cpu", "quick"], help="one run in this process, printed")
    options = parser.parse_args(arguments)
    if options.once:
        print(json.dumps(measure(TOKENS[options.once][0], options.repeats)))
        return 0
    rows = run(options.runs, options.repeats, options.shape, options.taken)
    about = record.header("fresh_results", torch.device("cpu"), options.shape == "quick")
    worst = min(row["ratio"] for row in rows)
    record.write(options.out, json.dumps({**about, "lowest_ratio": worst, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
