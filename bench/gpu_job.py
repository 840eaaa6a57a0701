# SPDX-License-Identifier: Apache-2.0
"""What a step of `bench.gpu` is given, and how it runs other programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import record

_ROOT = Path(__file__).resolve().parent.parent


@dataclass
class GpuJob:
    """A step's device, the folder of its files, and the seconds that it has.

    Attributes:
        failed: a line for everything that went wrong; the step adds them.
        skipped: why it did nothing, if it did nothing.
    """

    device: torch.device
    out: Path
    seconds: float
    failed: list[str] = field(default_factory=list)
    skipped: str = ""
    begun: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        """Of `time.monotonic`: what would begin later could not end."""
        return self.begun + 0.9 * self.seconds

    def write(self, name: str, result: Any) -> None:
        """``<name>.json``, whole."""
        record.write(self.out / f"{name}.json", json.dumps(result, indent=1) + "\n")


def run_command(command: list[str], seconds: float, good: tuple[int, ...] = (0,)) -> dict[str, Any]:
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
