# SPDX-License-Identifier: Apache-2.0
"""Compiles cuda/*.cu and the bindings for the host into a module that stands in for ``talkingdit._native``.

Objects are kept in build/simt and compiled again when a file that they were made of, or the command, has changed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
_HERE = ROOT / "tests" / "simt"
_FOLDER = ROOT / "build" / "simt"
_INCLUDES = [_HERE, _HERE / "include", ROOT / "csrc", ROOT / "cuda"]
_OPTIONS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-DTD_EMULATE",
    "-DTD_CUDA",
    "-Wno-psabi",
]
_KERNEL_OPTIONS = [
    "-O1",
    "-Wno-unknown-pragmas",
    "-fsanitize=alignment,signed-integer-overflow,integer-divide-by-zero,shift",  # each of them traps
    "-fsanitize-undefined-trap-on-error",
]


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _state(command: list[str], files: list[str]) -> str:
    """What an object was made of: the command, and every file with a digest of what it holds."""
    digests = [hashlib.sha256(Path(f).read_bytes()).hexdigest() if Path(f).exists() else "gone" for f in files]
    return "\n".join([" ".join(command), *(f"{digest} {file}" for digest, file in zip(digests, files, strict=True))])


def _compile(cxx: str, source: Path) -> Path:
    target, made_of = _FOLDER / f"{source.name}.o", _FOLDER / f"{source.name}.txt"
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    options = [*_OPTIONS, *python, *(_KERNEL_OPTIONS if source.suffix == ".cu" else ["-O0"])]
    command = [cxx, *options, *(f"-I{path}" for path in _INCLUDES), "-x", "c++", "-c", str(source)]
    if target.exists() and made_of.exists():
        before = made_of.read_text()
        if before == _state(command, [line.split(" ", 1)[1] for line in before.splitlines()[1:]]):
            return target
    unfinished, rule = (_FOLDER / f"{source.name}.{os.getpid()}.{suffix}" for suffix in ("o", "d"))
    _run([*command, "-o", str(unfinished), "-MMD", "-MF", str(rule)])
    files = rule.read_text().split(":", 1)[1].replace("\\\n", " ").split()
    rule.unlink()
    made_of.unlink(missing_ok=True)
    unfinished.replace(target)
    made_of.write_text(_state(command, [file for file in files if Path(file).is_relative_to(ROOT)]))
    return target


@functools.cache
def build() -> ModuleType:
    """The module, compiled if need be."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler was found")
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(_FOLDER / "lock"):  # several processes of pytest need it at the same time
        module = _link(cxx)
    spec = importlib.util.spec_from_file_location("_simt", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _link(cxx: str) -> Path:
    sources = [*ROOT.glob("cuda/*.cu"), *ROOT.glob("csrc/bind_*.cpp"), *_HERE.glob("*.cu"), *_HERE.glob("*.cpp")]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda source: _compile(cxx, source), sorted(sources)))
    module = _FOLDER / f"_simt{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists() or module.stat().st_mtime < max(path.stat().st_mtime for path in objects):
        unfinished = module.with_suffix(f".{os.getpid()}.tmp")
        _run([cxx, "-shared", *map(str, objects), "-o", str(unfinished)])
        unfinished.replace(module)
    return module
