# SPDX-License-Identifier: Apache-2.0
"""Contestants of a case on the CPU, each in a process of its own (`bench.contestant`), timed when it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from bench.harness import Setting

_ROOT = Path(__file__).resolve().parent.parent
_REST = 0.02  # seconds: threads of the one before may spin for work for some milliseconds


class Timed(NamedTuple):
    """One sample: microseconds per call, and page faults that the process took in all of its calls."""

    us: float
    page_faults: int


class Apart:
    """A timer for each contestant of a case; a context, at whose end their processes end.

    Args:
        benchmark: a file of this folder.
        number: of the case in it, under the same setting.
        contestants: as `harness.contestants` names them; "ours" brings "out" (where there is one) and "copy" along.

    Raises:
        RuntimeError: a process has ended.
    """

    def __init__(self, benchmark: str, number: int, contestants: Sequence[str], setting: Setting) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        what = {
            "benchmark": benchmark,
            "number": number,
            "quick": setting.quick,
            "compile": setting.compile,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in setting.dtypes],
            "shapes": [setting.shapes.start, setting.shapes.stop, setting.shapes.step],
            "threads": torch.get_num_threads(),
        }
        self._what = [{**what, "contestant": name} for name in contestants]

    def __enter__(self) -> dict[str, Callable[[], Timed]]:
        try:
            for what in self._what:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "bench.contestant", json.dumps(what)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                        cwd=_ROOT,
                    )
                )
            names = [_read(process) for process in self._processes]
        except BaseException:
            self.__exit__()
            raise
        pairs = zip(self._processes, names, strict=True)
        return {name: partial(_ask, process, name) for process, known in pairs for name in known}

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def _ask(process: subprocess.Popen[str], name: str) -> Timed:
    time.sleep(_REST)
    assert process.stdin is not None
    print(name, file=process.stdin, flush=True)
    return Timed(*_read(process))


def _read(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"bench: the process of a contestant must answer, it ended ({process.args})")
    return json.loads(line)
