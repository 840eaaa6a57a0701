# SPDX-License-Identifier: Apache-2.0
"""The build decides from the toolkit's version alone whether CUDA kernels are built, and for which GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLD = "80-real;86-real;89-real;90"
NEW = "80-real;86-real;89-real;90-real;100-real;120"
SCRIPT = """
include("{root}/cuda/toolkit.cmake")
td_choose_cuda("{choice}" "{archs}")
message("chosen: ${{TD_CUDA}} ${{TD_CUDA_VERSION}} ${{TD_CUDA_ARCHITECTURES}}")
td_builds_sm90a("${{TD_CUDA_ARCHITECTURES}}" "{native}" builds_sm90a)
message("sm90a: ${{builds_sm90a}}")
"""

CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])) or ""

pytestmark = pytest.mark.skipif(not CMAKE, reason="needs cmake")


@pytest.fixture
def cuda_home(tmp_path: Path) -> Path:
    """A folder for CUDA_HOME; `toolkit` puts an nvcc into it."""
    return tmp_path / "cuda"


def toolkit(home: Path, says: str) -> None:
    """An nvcc that can say its version and nothing else."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{says}"\n')
    nvcc.chmod(0o755)


def cmake(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_HOME": str(home)}
    return subprocess.run([CMAKE, *arguments], env=environment, capture_output=True, text=True)


def choose(home: Path, choice: str, archs: str = "", native: str = "") -> subprocess.CompletedProcess[str]:
    script = home.parent / "choose.cmake"
    script.write_text(SCRIPT.format(root=ROOT, choice=choice, archs=archs, native=native))
    return cmake(home, "-P", str(script))


def flat(text: str) -> str:
    """CMake wraps its messages."""
    return " ".join(text.split())


@pytest.mark.parametrize("choice", ["auto", "on", "ON"])
@pytest.mark.parametrize(("version", "archs"), [("12.4", OLD), ("12.6", OLD), ("12.8", NEW), ("13.0", NEW)])
def test_architectures_are_those_that_the_toolkit_knows(cuda_home: Path, choice: str, version: str, archs: str) -> None:
    toolkit(cuda_home, f"Cuda compilation tools, release {version}, V{version}.99")
    done = choose(cuda_home, choice)
    assert done.returncode == 0, done.stderr
    assert f"chosen: ON {version} {archs}" in done.stderr
    assert "Warning" not in done.stderr


def test_given_architectures_are_taken_as_they_are(cuda_home: Path) -> None:
    toolkit(cuda_home, "release 12.4, V12.4.131")
    assert "chosen: ON 12.4 90a-real;100-real" in choose(cuda_home, "on", "90a-real 100-real").stderr


@pytest.mark.parametrize(
    ("archs", "native", "builds"),
    [
        ("", "", True),
        ("90a-real", "", True),
        ("80-real 90", "", True),
        ("90-virtual", "", True),
        ("all-major", "", True),
        ("80-real 100-real", "", False),
        ("120", "", False),
        ("native", "90-real", True),
        ("native", "89-real", False),
    ],
)
def test_kernels_for_hopper_and_their_headers_only_where_hopper_is_meant(
    cuda_home: Path, monkeypatch: pytest.MonkeyPatch, archs: str, native: str, builds: bool
) -> None:
    """CMake and the build backend agree, but for "native", which only CMake can ask."""
    toolkit(cuda_home, "release 13.0, V13.0.88")
    assert f"sm90a: {'ON' if builds else 'OFF'}" in choose(cuda_home, "on", archs, native).stderr
    monkeypatch.setenv("TALKINGDIT_CUDA", "on")
    monkeypatch.setenv("TALKINGDIT_CUDA_ARCHS", archs)
    assert bool(requirements(monkeypatch)) == (builds or archs == "native")
    monkeypatch.setenv("TALKINGDIT_CUDA", "off")
    assert requirements(monkeypatch) == []


def requirements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What setup.py asks for besides what scikit-build-core does, which is not needed for that."""
    core = types.SimpleNamespace(get_requires_for_build_wheel=lambda settings: [])
    for hook in ("build_editable", "build_sdist", "build_wheel", "get_requires_for_build_sdist"):
        setattr(core, hook, None)
    for kind in ("editable", "wheel"):
        setattr(core, f"prepare_metadata_for_build_{kind}", None)
    monkeypatch.setitem(sys.modules, "scikit_build_core", types.SimpleNamespace(build=core))
    monkeypatch.setitem(sys.modules, "scikit_build_core.build", core)
    spec = importlib.util.spec_from_file_location("talkingdit_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    found: list[str] = backend.get_requires_for_build_wheel()
    return found


@pytest.mark.parametrize(
    ("says", "problem"),
    [
        ("release 12.3, V12.3.107", "CUDA 12.3 ({nvcc}) is too old, 12.4 or newer is needed."),
        ("release 11.8, V11.8.89", "CUDA 11.8 ({nvcc}) is too old, 12.4 or newer is needed."),
        ("no such thing", "{nvcc} does not say its version."),
    ],
)
def test_a_toolkit_that_does_not_do_is_named(cuda_home: Path, says: str, problem: str) -> None:
    toolkit(cuda_home, says)
    problem = problem.format(nvcc=cuda_home / "bin" / "nvcc")
    done = choose(cuda_home, "auto")
    assert done.returncode == 0
    assert f"talkingdit is built for the CPU alone: {problem}" in flat(done.stderr)
    assert "chosen: OFF" in done.stderr
    done = choose(cuda_home, "on")
    assert done.returncode != 0
    assert f"TALKINGDIT_CUDA=on, but {problem}" in flat(done.stderr)


def test_off_looks_for_nothing_and_another_word_is_an_error(cuda_home: Path) -> None:
    toolkit(cuda_home, "release 12.3, V12.3.107")
    assert "chosen: OFF" in choose(cuda_home, "off").stderr
    done = choose(cuda_home, "yes")
    assert done.returncode != 0
    assert "TALKINGDIT_CUDA: expected auto, on or off, got 'yes'" in flat(done.stderr)


@pytest.mark.parametrize(
    ("version", "choice", "succeeds", "says"),
    [
        ("12.3", "auto", True, "talkingdit: CUDA kernels OFF (TALKINGDIT_CUDA=auto)"),
        ("12.3", "on", False, "TALKINGDIT_CUDA=on, but CUDA 12.3"),
        ("12.4", "on", False, f"talkingdit: CUDA 12.4, architectures {OLD}"),  # fails later: it compiles nothing
    ],
)
def test_the_project_does_what_was_chosen(
    cuda_home: Path, tmp_path: Path, version: str, choice: str, succeeds: bool, says: str
) -> None:
    asked = subprocess.run([CMAKE, "--version"], capture_output=True, text=True).stdout
    if tuple(int(n) for n in re.findall(r"\d+", asked)[:2]) < (3, 26):
        pytest.skip("needs cmake 3.26")
    toolkit(cuda_home, f"release {version}, V{version}.99")
    options = [f"-DTALKINGDIT_CUDA={choice}", f"-DPython_EXECUTABLE={sys.executable}"]
    done = cmake(cuda_home, "-S", str(ROOT), "-B", str(tmp_path / "build"), *options)
    assert (done.returncode == 0) == succeeds, done.stderr
    assert says in flat(done.stdout + done.stderr)
