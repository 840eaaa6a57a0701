# SPDX-License-Identifier: Apache-2.0
"""An op is the seven files of `add_an_op` and a line in talkingdit/ops/__init__.py: nothing else lists ops."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).parent / "add_an_op"
OP = "scale_rows"
FILES = {
    "bench/{op}.py",
    "csrc/bind_{op}.cpp",
    "csrc/core/{op}.h",
    "csrc/cpu/{op}.cpp",
    "cuda/{op}.cu",
    "talkingdit/ops/{op}.py",
    "tests/ops/test_{op}.py",
}
EXPORTS = "talkingdit/ops/__init__.py"
ROOMS = ("CMakeLists.txt", "Makefile", "setup.py", "bench", "csrc", "cuda", "talkingdit/ops", "tests", "tools")
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".cmake", "")
# The kernels of ops, which take minutes to compile.
KERNELS = re.compile(r"csrc/(bind_|cpu/).*\.cpp|cuda/(?!device)\w+\.cu")


def ops() -> list[str]:
    """Those that have a binding and a public module."""
    bound = {path.stem.removeprefix("bind_") for path in ROOT.glob("csrc/bind_*.cpp")}
    return sorted(bound & {path.stem for path in ROOT.glob("talkingdit/ops/[a-z]*.py")})


def texts() -> dict[str, str]:
    """Every source of the rooms in which ops live, by its path."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")) if (ROOT / room).is_dir() else [ROOT / room]:
            if path.suffix in SOURCES and path.is_file():
                found[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return found


def lists(text: str, names: list[str]) -> bool:
    """Do two thirds of all ops stand in the text, as words of their own?"""
    return 3 * sum(re.search(rf"\b{name}\b", text) is not None for name in names) >= 2 * len(names)


def test_the_template_is_seven_files() -> None:
    found = {path.relative_to(TEMPLATE).as_posix() for path in TEMPLATE.rglob("*") if path.suffix in SOURCES[:4]}
    assert found == {name.format(op=OP) for name in FILES}


def test_every_op_has_the_same_files_in_every_room() -> None:
    """One op, one name. What PyTorch does best on a device has no kernel there; many kernels have many files."""
    missing = {name.format(op=op) for op in ops() for name in FILES if not (ROOT / name.format(op=op)).exists()}
    assert missing == {"csrc/cpu/frame_linear.cpp", "cuda/gelu_tanh.cu"}


def test_no_shared_file_lists_the_ops() -> None:
    """A list that a new op had to join would name most of the old ones. A test of torch.compile uses most ops at
    once; a new op need not be in it."""
    together = {"tests/ops/test_inductor.py"}
    listing = {name for name, text in texts().items() if lists(text, ops())}
    assert len(ops()) >= 7
    assert listing - together == {EXPORTS}
    assert lists(" ".join(ops()), ops())


def run(folder: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def cmake() -> str:
    """A CMake that can build the project."""
    found = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout if found else ""
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (3, 26):
        pytest.skip("needs cmake 3.26")
    assert found is not None
    return found


# Python runs this as it starts. The finder of an editable install comes before PYTHONPATH, and finds the repository.
NOT_EDITABLE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", type(f).__module__)]
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The repository with the op of the template, and without the kernels of its own ops."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        place = Path(folder).relative_to(ROOT).as_posix()
        kept_back = ("__pycache__", "assets", "add_an_op")
        return [
            name for name in names if name in kept_back or name.endswith(".so") or KERNELS.fullmatch(f"{place}/{name}")
        ]

    for room in ("bench", "csrc", "cuda", "talkingdit", "training", "tests/ops", "tests/simt", "tools"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=left_out)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(TEMPLATE, tmp_path, dirs_exist_ok=True)
    exports = tmp_path / EXPORTS
    exports.write_text(f"{exports.read_text()}from talkingdit.ops.{OP} import *\n")
    (tmp_path / "sitecustomize.py").write_text(NOT_EDITABLE)
    return tmp_path


@pytest.mark.slow
def test_an_op_of_seven_files_and_a_line_is_built_exported_tested_and_measured(tree: Path) -> None:
    python, build = sys.executable, tree / "build"
    run(tree, cmake(), "-S", ".", "-B", str(build), f"-DPython_EXECUTABLE={python}", "-DTALKINGDIT_CUDA=off")
    run(tree, cmake(), "--build", str(build), "--parallel", "2")
    assert "passed" in run(tree, python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/test_{OP}.py")
    run(tree, python, "-m", "bench", OP, "--quick", "--device", "cpu", "--out", "results")
    rows = json.loads((tree / "results" / f"cpu-{OP}.json").read_text())["rows"]
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    code = "from bench import cases; print(*cases.names())"  # what bench.gpu measures in one go
    assert OP in run(tree, python, "-c", code).split()
    if shutil.which("nvcc"):
        assert f"{OP}.cu" in run(tree, python, "tools/check_ptxas.py", "--archs", "90a", "--jobs", "1")
