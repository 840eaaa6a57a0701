# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA source for the given architectures and fails on register spills or local memory.

    python tools/check_ptxas.py [--archs 80 90a] [files...]

Needs nvcc, no GPU. A stack frame or spill costs memory traffic that no kernel here is meant to have.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
_FUNCTION = re.compile(r"Function properties for (\S+)|Compiling entry function '(\S+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def includes() -> list[str]:
    paths = [ROOT / "csrc", ROOT / "cuda"]
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.submodule_search_locations:
        paths.append(Path(spec.submodule_search_locations[0], "source", "include"))
    return [f"-I{path}" for path in paths]


def check(source: Path, arch: str) -> tuple[list[str], int, int]:
    """(complaints, kernels seen, most registers) of one file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc", "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-Xptxas=-v",
            f"-gencode=arch=compute_{arch},code=sm_{arch}", *includes(), "-c", str(source), "-o", f"{folder}/out.o",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return [f"does not compile\n{done.stderr}"], 0, 0
    complaints, kernels, registers, function = [], 0, 0, "?"
    for line in done.stderr.splitlines():
        if found := _FUNCTION.search(line):
            function = found[1] or found[2]
        elif found := _FRAME.search(line):
            kernels += 1
            if any(int(number) for number in found.groups()):
                complaints.append(f"{function}: {line.strip()}")
        elif found := _REGISTERS.search(line):
            registers = max(registers, int(found[1]))
    return complaints, kernels, registers


def main() -> int:
    parser = argparse.ArgumentParser(description="Fail on register spills or local memory in CUDA kernels.")
    parser.add_argument("files", nargs="*", type=Path, help="CUDA sources; all of cuda/ unless given")
    parser.add_argument("--archs", nargs="+", default=["80", "90a"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    sources = arguments.files or sorted(ROOT.joinpath("cuda").glob("*.cu"))
    tasks = [(source, arch) for source in sources for arch in arguments.archs]
    failed = False
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (source, arch), result in zip(tasks, pool.map(lambda task: check(*task), tasks), strict=True):
            complaints, kernels, registers = result
            print(f"{source.name:28} sm_{arch:4} {kernels:3} kernels, at most {registers} registers", flush=True)
            for complaint in complaints:
                failed = True
                print("  " + complaint)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
