# SPDX-License-Identifier: Apache-2.0
"""Compiles cuda/*.cu and the bindings for the host into a module that stands in for ``talkingdit._native``.

Objects are kept in build/simt under a name made of their source, every header and the options, so that a second run
compiles nothing and a change of one kernel compiles one file.
"""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parents[2]
_HERE = ROOT / "tests" / "simt"
_FOLDER = ROOT / "build" / "simt"
_INCLUDES = [_HERE, _HERE / "include", ROOT / "csrc", ROOT / "cuda"]
# A misaligned vector or an integer overflow traps.
_CHECKS = ["-fsanitize=alignment,signed-integer-overflow,integer-divide-by-zero,shift", "-fsanitize-undefined-trap-on-error"]
_OPTIONS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DTD_EMULATE", "-DTD_CUDA", "-Wno-psabi"]


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def build(extra: dict[str, Path] | None = None) -> ModuleType:
    """The module. ``extra`` replaces source files by name, to see that tests notice a fault."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler was found")
    _FOLDER.mkdir(parents=True, exist_ok=True)
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    headers = sorted(path for folder in _INCLUDES for path in folder.rglob("*.*h"))
    common = _digest(cxx.encode(), *(path.read_bytes() for path in headers), str(_OPTIONS + _CHECKS + python).encode())
    sources = [*sorted(ROOT.glob("cuda/*.cu")), *sorted(ROOT.glob("csrc/bind_*.cpp")), *sorted(_HERE.glob("*.cpp"))]
    sources = [(extra or {}).get(source.name, source) for source in sources]

    def compile_one(source: Path) -> Path:
        target = _FOLDER / f"{source.stem}-{_digest(common.encode(), source.read_bytes())}.o"
        if not target.exists():
            kernel = source.suffix == ".cu"
            options = [*_OPTIONS, *(["-O1", *_CHECKS, "-Wno-unknown-pragmas"] if kernel else ["-O0", *python])]
            includes = [f"-I{path}" for path in _INCLUDES]
            unfinished = target.with_suffix(f".{os.getpid()}.tmp")
            _run([cxx, *options, *includes, "-x", "c++", "-c", str(source), "-o", str(unfinished)])
            unfinished.replace(target)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    module = _FOLDER / _digest(*(path.name.encode() for path in objects)) / f"_simt{suffix}"
    if not module.exists():
        module.parent.mkdir(exist_ok=True)
        unfinished = module.with_suffix(f".{os.getpid()}.tmp")
        _run([cxx, "-shared", *map(str, objects), "-o", str(unfinished)])
        unfinished.replace(module)
    spec = importlib.util.spec_from_file_location("_simt", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
