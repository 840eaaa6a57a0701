# SPDX-License-Identifier: Apache-2.0
"""Kills what writes at its saving moments, runs it again, and compares with a run that nobody disturbed.

A program, started by `start` with moments.so before the C library. For each writer it makes an undisturbed run, which
also lists the moments; then for each chosen moment a run that dies there and one that goes on. All are forks of this
process, so that libraries are imported once.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REPORTS = "reports.jsonl"  # a line for each writer


class Writer(Protocol):
    """What is killed."""

    def begin(self, folder: Path) -> None:
        """Make what a run finds in its folder."""

    def run(self, folder: Path) -> int:
        """The run, as a user's; its exit status."""

    def result(self, folder: Path) -> Any:
        """What it made, to be compared; any exception says that it is not whole."""

    def kept(self, folder: Path) -> int | None:
        """How much a rerun will find done: clips, samples, steps. None where that is not what it is about.

        Raises:
            AssertionError: what was there before the run is lost.
        """

    def goes_on(self, log: str) -> int:
        """How much the rerun says that it found done."""


@dataclass
class Report:
    """What came of the kills of one writer."""

    writer: str
    moments: int = 0  # in an undisturbed run
    kills: int = 0
    completed: int = 0  # reruns that ended well
    equal: int = 0  # with the result of the undisturbed run
    faults: list[str] = field(default_factory=list)


def start(writers: list[str], kills: int, folder: Path, timeout: float) -> list[Report]:
    """Run the program for some writers.

    Args:
        kills: of each writer.
        folder: for everything that is made.

    Raises:
        subprocess.CalledProcessError: the program failed.
    """
    library = folder / "moments.so"
    command = [os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-o", library, HERE / "moments.c", "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "training", ROOT / "tests" / "eval"]
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / "trials.py"), *writers, "--kills", str(kills), "--folder", str(folder)]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=timeout, check=True)
    return [Report(**json.loads(line)) for line in (folder / REPORTS).read_text().splitlines()]


# ---- One trial -------------------------------------------------------------------------------------------------------


def fork(run: Callable[[Path], int], folder: Path, kill_at: int, log: Path, listed: Path | None = None) -> int:
    """Run in a child that dies at a moment; 0 for never. Returns its exit status, negative for a signal."""
    gc.collect()  # frames of this process know threads that a child has not, and waits for when it frees them
    gc.freeze()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 99
    try:
        signal.alarm(120)  # a run that hangs is a fault
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        moments = -1 if listed is None else os.open(listed, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        ctypes.CDLL(None).moments_arm(os.fsencode(folder), ctypes.c_long(kill_at), moments)
        status = run(folder)
        if listed is not None:
            listed.with_suffix(".modules").write_text("\n".join(list(sys.modules)))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def choose(moments: list[str], kills: int) -> list[int]:
    """Half of the kills among all moments but writes, half among all, evenly; numbers from 1."""
    every = range(1, len(moments) + 1)
    aimed = [number for number in every if not moments[number - 1].startswith("write ")]
    if kills >= len(moments):
        return list(every)
    chosen = set(_spread(aimed, (kills + 1) // 2))
    rest = [number for number in every if number not in chosen]
    return sorted(chosen | set(_spread(rest, kills - len(chosen))))


def _spread(numbers: list[int], count: int) -> list[int]:
    count = min(count, len(numbers))
    return [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]


def try_writer(name: str, writer: Writer, kills: int, folder: Path) -> Report:
    """All trials of a writer."""
    report, whole, listed = Report(name), folder / f"{name}-whole", folder / f"{name}-moments"
    log = folder / f"{name}.log"
    whole.mkdir()
    writer.begin(whole)
    before = names(whole)
    if fork(writer.run, whole, 0, log, listed):
        raise RuntimeError(f"{name}: the undisturbed run failed:\n{log.read_text()}")
    wanted, left = writer.result(whole), names(whole)
    moments = listed.read_text().splitlines()
    for module in listed.with_suffix(".modules").read_text().splitlines():  # once, and not in every run
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    report.moments = len(moments)
    for number in choose(moments, kills):
        trial = folder / f"{name}-{number}"
        trial.mkdir()
        writer.begin(trial)
        assert names(trial) == before
        where = f"{name}, moment {number} ({moments[number - 1]}): "
        fault = _try_once(writer, trial, number, wanted, left, report)
        print(where, fault or "well", file=sys.stderr, flush=True)
        if fault:
            report.faults.append(where + fault)
        else:
            shutil.rmtree(trial)
    return report


def _try_once(writer: Writer, trial: Path, number: int, wanted: Any, left: list[str], report: Report) -> str:
    log = trial.with_suffix(".log")
    status = fork(writer.run, trial, number, log)
    if status != -signal.SIGKILL:
        return f"the run was not killed, but ended with status {status}: {log.read_text()[-2000:]}"
    report.kills += 1
    try:
        kept = writer.kept(trial)
    except Exception as error:
        return f"the kill lost something: {error!r}"
    log.unlink()
    status = fork(writer.run, trial, 0, log)
    said = log.read_text()
    if status:
        return f"the rerun ended with status {status}: {said[-2000:]}"
    report.completed += 1
    try:
        same = writer.result(trial) == wanted
    except Exception as error:
        return f"the result cannot be read: {error!r}"
    if not same:
        return "the result is another than that of the undisturbed run"
    report.equal += 1
    if kept is not None and writer.goes_on(said) != kept:
        return f"{kept} were done, but the rerun went on after {writer.goes_on(said)}"
    if names(trial) != left:
        return f"files are left: {sorted(set(names(trial)) ^ set(left))}"
    return ""


def names(folder: Path) -> list[str]:
    """All files below a folder, without the random parts of TensorBoard's."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name)


# ---- The program -----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("writers", nargs="+")
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    import writers

    for name in options.writers:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix=f"{name}-") as folder:
            made = writers.MAKE[name](Path(folder))
            report = try_writer(name, made, options.kills, Path(os.path.realpath(folder)))
        with (options.folder / REPORTS).open("a") as file:
            file.write(json.dumps(asdict(report)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
