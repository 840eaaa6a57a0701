# SPDX-License-Identifier: Apache-2.0
"""The build backend: scikit-build-core, plus one build requirement that depends on the machine.

``pip install .`` calls the functions here (PEP 517; pyproject.toml names this file). CUTLASS headers come from the
``nvidia-cutlass`` wheel, which is asked for only when CUDA kernels for Hopper are going to be built (cuda/sm90a): a
build for the CPU or for other GPUs does not download it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

if __name__ == "__main__":
    raise SystemExit("setup.py is a build backend and takes no commands: run `pip install .` in this folder.")

from scikit_build_core import build as _build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# As td_builds_sm90a in cuda/toolkit.cmake: Hopper, or what may turn out to be Hopper.
_HOPPER = re.compile(r"(90a?(-real|-virtual)?|all|all-major|native)")


def _builds_cuda() -> bool:
    choice = os.environ.get("TALKINGDIT_CUDA", "auto").lower()
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return choice == "on" or (choice == "auto" and bool(shutil.which("nvcc") or Path(home, "bin", "nvcc").exists()))


def _cutlass_requirement() -> list[str]:
    archs = os.environ.get("TALKINGDIT_CUDA_ARCHS", "").replace(";", " ").split()
    hopper = not archs or any(_HOPPER.fullmatch(arch) for arch in archs)
    return ["nvidia-cutlass>=4.2"] if _builds_cuda() and hopper else []


def get_requires_for_build_wheel(config_settings: dict[str, list[str] | str] | None = None) -> list[str]:
    return [*_build.get_requires_for_build_wheel(config_settings), *_cutlass_requirement()]


def get_requires_for_build_editable(config_settings: dict[str, list[str] | str] | None = None) -> list[str]:
    return [*_build.get_requires_for_build_editable(config_settings), *_cutlass_requirement()]
