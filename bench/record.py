# SPDX-License-Identifier: Apache-2.0
"""Results as files: what they say of the machine and the code, and writing them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import talkingdit
from talkingdit.atomic import write_whole
from talkingdit.lock import changing

_ROOT = Path(__file__).resolve().parent.parent


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Of the repository, with "-dirty" for uncommitted changes of anything but results.

    What TALKINGDIT_COMMIT says, where it is set: a tree that was carried elsewhere may have lost its git, or gained
    another one. "unknown" where neither says it.
    """
    if stated := os.environ.get("TALKINGDIT_COMMIT"):
        return stated
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


def header(name: str, device: torch.device, quick: bool) -> dict[str, Any]:
    """What a result says of the machine and the code."""
    cuda = device.type == "cuda"
    return {
        "name": name,
        "machine": f"{_cpu_name()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "talkingdit": talkingdit.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda if cuda else None,
            "cpu_isa": talkingdit.build_info()["cpu_isa"],
        },
        "commit": _commit(),
        "quick": quick,
    }


def write(path: Path, text: str) -> None:
    """All of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


@contextmanager
def adding_to(path: Path) -> Iterator[None]:
    """For a block that reads a file and writes it with more in it: others wait, so that no row of theirs is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with changing(path, "bench"):
        yield


def save(result: Mapping[str, Any], folder: Path, device: str) -> Path:
    path = folder / f"{device}-{result['name']}.json"
    write(path, json.dumps(result, indent=1) + "\n")
    return path
