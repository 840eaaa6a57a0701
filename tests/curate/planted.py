# SPDX-License-Identifier: Apache-2.0
"""Stages whose figures are known, and some that bring their process down, for tests of what runs them."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import ClipFindings, Figures

NAME = "planted"


class Quick:
    """A grey level and two lengths, with no model."""

    gpu = False

    def __init__(self, watch: Watch) -> None:
        self._given = watch.models

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        time.sleep(float(self._given.get("sleep", 0)))
        return {
            "clip.seconds": look.seconds,
            "clip.height": look.size[0],
            "grey": float(look.pictures.mean()),
            "heard": len(look.samples),
        }


class Card(Quick):
    """Runs where cards are; sees what was sent to it."""

    gpu = True

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        return {"card.pictures": len(look.pictures), "card.heard": len(look.samples), "card.pid": os.getpid()}


class Deadly(Quick):
    """Kills its process at videos whose name says so: "once", or always."""

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        tried = Path(self._given["marks"]) / look.video.name
        if "always" in look.video.name or ("once" in look.video.name and not tried.exists()):
            tried.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if "full" in look.video.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if "wrong" in look.video.name:
            raise RuntimeError("a model fell over")
        return super().measure(look, found)
