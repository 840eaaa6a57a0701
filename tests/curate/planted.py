# SPDX-License-Identifier: Apache-2.0
"""Stages whose figures are known, and some that bring their process down, for tests of what runs them."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import numpy as np

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import ClipFindings, Figures, Person

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


class Faces(Quick):
    """Two people who are found without a model, and a voice all the time; notes every clip that it sees."""

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        with (Path(self._given["marks"]) / "seen.txt").open("a", encoding="utf-8") as file:
            file.write(f"{look.video.name}\n")
        count, (height, width) = len(look.pictures), look.pictures.shape[1:3]
        for left in (0.1, 0.5):
            box = np.array([left * width, 0.2 * height, (left + 0.3) * width, 0.6 * height], np.float32)
            found.people.append(Person(np.tile(box, (count, 1)), 1.0, np.zeros(count, np.float32)))
        found.spoken = [(0.0, look.seconds)]
        found.hands, found.bodies, found.facing = [(0, 1.0, 2.0, 3.0, 4.5)], {0: (0.0, 1.0, 2.0, 3.0)}, {0: -12.5}
        return super().measure(look, found)
