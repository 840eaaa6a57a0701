# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu --out DIR``: everything that needs a GPU, what matters most first (docs/gpu.md).

Part 1 takes 8.5 minutes by its own clock: small and large cases against float64, CUDA graphs and
``torch.compile(fullgraph=True)``; every op at its first, released shape; whole blocks; compiled baselines; other
shapes; a profiler's counters; compute-sanitizer. Part 2 takes 3: the tests marked ``cuda``, and a training step.

Each step is a process with a time limit of its own, so that no fault and no compiler takes the others' time. Every row
is written as it comes, so what a step had when it was stopped is kept, and ``--archive`` holds all of it in one file,
made anew after every step. Steps that no longer fit, or lack a package, are left out and named.
``python -m bench report --out DIR`` makes a table of the ``cuda-*.json`` files. ``--dry-run`` does on the CPU what can
be done there, in one process, on tiny shapes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import talkingdit
from bench import cases, gpu_checks, harness, record
from bench.gpu_job import GpuJob, run_command

_ROOT = Path(__file__).resolve().parent.parent
_MODEL_PACKAGES = ("diffusers", "importlib_metadata", "tyro", "docstring_parser", "typeguard")  # to import a model
_MINUTES = {1: 8.5, 2: 3.0}


@dataclass(frozen=True)
class GpuStep:
    """``run(job)`` writes its files and names what failed.

    Attributes:
        cap: seconds after which it is stopped.
        part: of the two in which it runs.
        needs: packages without which it is left out.
        dry: it also does something on a CPU.
    """

    run: Callable[[GpuJob], None]
    cap: float
    part: int = 1
    needs: Sequence[str] = ()
    dry: bool = True


def _setting(job: GpuJob, **options: Any) -> harness.Setting:
    """On a GPU bfloat16 alone, which is what models run in, with a quarter of a second for each contestant."""
    if job.device.type == "cpu":
        return harness.Setting(job.device, quick=True, compile=False, shapes=options.get("shapes", slice(None)))
    options = {"compile": False, "dtypes": (torch.bfloat16,), "seconds": 0.25, "keep_going": True} | options
    return harness.Setting(job.device, deadline=job.deadline, **options)


def _measure(suffix: str = "", blocks: bool = False, **options: Any) -> Callable[[GpuJob], None]:
    """All ops, or all whole blocks, in one process, those first that are marked so."""

    def run(job: GpuJob) -> None:
        chosen = [name for name in cases.names() if cases.load(name).block == blocks]
        for name in sorted(chosen, key=lambda name: not cases.load(name).early):
            file, label = f"{job.device.type}-{name}{suffix}", f"{name}{suffix}"
            setting = _setting(job, **options)
            result = harness.run(label, cases.load(name), setting, lambda found, file=file: job.write(file, found))
            if result["rows"]:
                job.write(file, result)
            job.failed += result.get("failed", [])

    return run


def _measure_block(job: GpuJob) -> None:
    from bench import block

    file = f"{job.device.type}-block"
    result = block.run(_setting(job), lambda found: job.write(file, found))
    job.failed += result.get("failed", [])
    job.write(file, result)


def _measure_training(job: GpuJob) -> None:
    from bench import train_step

    cuda = job.device.type == "cuda"
    shape = train_step.SHAPES["14b-704x1024" if cuda else "tiny"]
    file, modes = f"{job.device.type}-train_step", ("off", "full") if cuda else ("full",)
    train_step.run(shape, job.device, None, 3, modes, lambda found: job.write(file, found))


def _tell_build(job: GpuJob) -> None:
    job.write("build", talkingdit.build_info())


def steps() -> dict[str, GpuStep]:
    """In order of importance."""
    first, others = slice(0, 1), slice(1, None)
    return {
        "build": GpuStep(_tell_build, cap=30.0),
        "small": GpuStep(gpu_checks.check_small, cap=60.0),
        "graphs": GpuStep(gpu_checks.check_graphs, cap=45.0, dry=False),
        "large": GpuStep(gpu_checks.check_large, cap=30.0),
        "ops": GpuStep(_measure(shapes=first), cap=90.0),
        "block": GpuStep(_measure_block, cap=90.0, needs=_MODEL_PACKAGES),
        "compiled": GpuStep(_measure("-compiled", shapes=first, compile="only"), cap=120.0, dry=False),
        "blocks": GpuStep(_measure(shapes=first, blocks=True), cap=40.0, needs=_MODEL_PACKAGES),
        "shapes": GpuStep(_measure("-more", shapes=others), cap=90.0, dry=False),
        "counters": GpuStep(gpu_checks.read_counters, cap=60.0, dry=False),
        "sanitizer": GpuStep(gpu_checks.check_sanitizer, cap=90.0, dry=False),
        "tests": GpuStep(gpu_checks.check_tests, cap=90.0, part=2, dry=False),
        "training": GpuStep(_measure_training, cap=90.0, part=2, needs=_MODEL_PACKAGES),
    }


# ---- running steps -------------------------------------------------------------------------------------------------
def run_step(name: str, step: GpuStep, device: torch.device, out: Path, seconds: float) -> dict[str, Any]:
    """Runs a step in this process; what became of it, which is also written to ``step-<name>.json``."""
    job = GpuJob(device, out, seconds)
    try:
        step.run(job)
    except Exception:
        job.failed.append(traceback.format_exc())
    ended: dict[str, Any] = {"failed": job.failed} | ({"skipped": job.skipped} if job.skipped else {})
    job.write(f"step-{name}", ended)
    return ended


def run_child(name: str, step: GpuStep, device: torch.device, out: Path, seconds: float) -> dict[str, Any]:
    """Runs a step in a process that is stopped after `seconds`; what became of it."""
    path = out / f"step-{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu", "--step", name, "--out", str(out), "--seconds", f"{seconds:.0f}"]
    ran = run_command(command + (["--dry-run"] if device.type == "cpu" else []), seconds)
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    ended = {"failed": ran["failed"] and [f"{ran['failed'][0]}: {ran['output']}"], **_only(ran, "skipped")}
    record.write(path, json.dumps(ended, indent=1) + "\n")
    return ended


def _only(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {key: value[key]} if key in value else {}


def missing(step: GpuStep) -> list[str]:
    """Packages that a step needs and this Python has not."""
    return [name for name in step.needs if importlib.util.find_spec(name) is None]


def run_steps(
    chosen: dict[str, GpuStep],
    device: torch.device,
    out: Path,
    minutes: float,
    runner: Callable[..., dict[str, Any]] = run_child,
    least: float = 10.0,
    after: Callable[[], None] = lambda: None,
) -> list[str]:
    """Runs steps in order while `least` seconds are left; returns what failed, was stopped or was left out.

    ``after`` is called after every one.
    """
    end = time.monotonic() + 60 * minutes
    problems: list[str] = []
    for name, step in chosen.items():
        begin = time.monotonic()
        if lacking := missing(step):
            problems.append(f"{name}: left out, it needs {', '.join(lacking)}")
            continue
        if end - begin < least:
            problems.append(f"{name}: left out, {max(0.0, end - begin):.0f} s were left")
            continue
        ended = runner(name, step, device, out, min(step.cap, end - begin))
        problems += [f"{name}: {line}" for line in ended["failed"]]
        skipped = ended.get("skipped", "")
        problems += [f"{name}: {skipped}"] if skipped else []
        state = f"{time.monotonic() - begin:.1f} s, {len(ended['failed'])} failed"
        print(f"{name}: {state}{', ' * bool(skipped)}{skipped}", flush=True)
        after()
    return problems


def pack(out: Path, archive: Path) -> None:
    """All results of a folder in one file, whole or not at all."""
    unfinished = archive.with_name(f".{archive.name}.unfinished")
    with tarfile.open(unfinished, "w:gz") as tar:
        for path in sorted(out.glob("*.json")) + sorted(out.glob("*.csv")):
            tar.add(path, path.name)
    unfinished.replace(archive)


# ---- the command ---------------------------------------------------------------------------------------------------
def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in steps()]:
        raise argparse.ArgumentTypeError(f"expected steps of {', '.join(steps())}, got {', '.join(unknown)}")
    return names


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", default=_ROOT / "build" / "gpu", help="folder of results")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="a .tar.gz of them, made after every step")
    parser.add_argument("--part", type=int, choices=sorted(_MINUTES), default=1)
    parser.add_argument("--minutes", type=float, help="time for everything (default: 8.5, or 3 for part 2)")
    parser.add_argument("--only", type=_names, metavar="STEP,...", help="these steps, of both parts")
    parser.add_argument("--skip", type=_names, metavar="STEP,...", default=[], help="not these")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, nothing compiled")
    parser.add_argument("--step", choices=list(steps()), help="one step in this process")
    parser.add_argument("--seconds", type=float, default=60.0, help="time that it has")
    parser.add_argument("--once", choices=["small", "first"], help="run small cases, or first shapes, once each")
    return parser.parse_args(arguments)


def choose(options: argparse.Namespace) -> dict[str, GpuStep]:
    """The steps that were asked for."""
    return {
        name: step
        for name, step in steps().items()
        if (name in options.only if options.only else options.dry_run or step.part == options.part)
        and name not in options.skip
        and (step.dry or not options.dry_run)
    }


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("bench.gpu: no CUDA device was found; --dry-run does what can be done without", file=sys.stderr)
        return 1
    if not options.dry_run and not talkingdit.build_info()["cuda"]:
        print("bench.gpu: talkingdit was built without CUDA kernels", file=sys.stderr)
        return 1
    device = torch.device("cpu" if options.dry_run else "cuda")
    if options.once is not None:
        gpu_checks.run_once(options.once, device)
        return 0
    out = options.out.resolve()
    if options.step is not None:
        return 1 if run_step(options.step, steps()[options.step], device, out, options.seconds)["failed"] else 0
    runner = run_step if options.dry_run else run_child
    minutes = options.minutes or _MINUTES[options.part]
    problems: list[str] = []

    def after() -> None:
        if options.archive:
            pack(out, options.archive.resolve())

    problems = run_steps(choose(options), device, out, minutes, runner, after=after)
    record.write(out / "problems.json", json.dumps(problems, indent=1) + "\n")
    after()
    for line in problems:
        print(line[:500])
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
