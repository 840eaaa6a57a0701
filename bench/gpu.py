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
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import talkingdit
from bench import block, cases, harness, record, train_step
from bench.gpu_checks import (
    Write,
    check_graphs,
    check_large,
    check_sanitizer,
    check_small,
    check_tests,
    results,
    run_command,
)

_ROOT = Path(__file__).resolve().parent.parent


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
        return harness.run(name, cases.load(name), _setting(device, seconds, False), write)

    return Step(run, cap=60.0, measures=name)


def _measure_compiled(name: str) -> Step:
    """Our op and its compiled baselines, in a file of its own, which the report joins to the other."""

    def run(device: torch.device, seconds: float, write: Write) -> Any:
        return harness.run(name, cases.load(name), _setting(device, seconds, "only"), write)

    return Step(run, cap=90.0, measures=f"{name}-compiled")


def _measure_block(device: torch.device, seconds: float, write: Write) -> Any:
    return block.run(_setting(device, seconds, False), write)


def _measure_training(device: torch.device, seconds: float, write: Write) -> Any:
    shape = train_step.SHAPES["14b-704x1024" if device.type == "cuda" else "tiny"]
    return train_step.run(shape, device, None, 3, ("off", "full") if device.type == "cuda" else ("full",))


def steps() -> dict[str, Step]:
    """In order of importance."""
    ops = [name for name in cases.names() if not cases.load(name).block]
    early = [name for name in ops if cases.load(name).early]
    return {
        "build": Step(lambda *_: talkingdit.build_info(), cap=20.0),
        "small": Step(check_small, cap=60.0),
        "graphs": Step(check_graphs, cap=60.0),
        "large": Step(check_large, cap=30.0),
        "tests": Step(check_tests, cap=60.0),
        **{name: _measure(name) for name in early},
        "block": Step(_measure_block, cap=90.0, measures="block"),
        "training": Step(_measure_training, cap=120.0, measures="train_step"),
        "audio_block": _measure("audio_block"),
        **{name: _measure(name) for name in ops if name not in early},
        "sanitizer": Step(check_sanitizer, cap=90.0),
        **{f"compiled-{name}": _measure_compiled(name) for name in ops},
    }


def run_step(name: str, step: Step, device: torch.device, out: Path, seconds: float) -> Any:
    """Runs a step in this process and writes its file."""
    path = out / step.file(name, device)
    path.unlink(missing_ok=True)

    def write(result: Any) -> None:
        record.write(path, json.dumps(result, indent=1) + "\n")

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
    ended = run_command(command + (["--dry-run"] if device.type == "cpu" else []), seconds)
    result = json.loads(path.read_text()) if path.exists() else {"failed": [f"it wrote nothing: {ended['output']}"]}
    if "skipped" in ended:
        result["skipped"] = ended["skipped"]
        record.write(path, json.dumps(result, indent=1) + "\n")
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
        for case in cases.small_cases(torch.bfloat16, device):
            results(case.op, case.inputs, case.gradients)
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
    record.write(options.out / "problems.json", json.dumps(problems, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
