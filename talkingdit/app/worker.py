# SPDX-License-Identifier: Apache-2.0
"""The process that makes the app's videos: `python -m talkingdit.app.worker '{"device": ...}'`.

Runs come as lines of JSON on standard input; what happens goes out as lines of JSON on standard output. The model stays
loaded from one run to the next: a worker has one model, and for another one the server starts another worker. SIGINT
ends the run, not the worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.api.road import made
from talkingdit.app.asked import Asked, Machine, chosen, loras_of, prepare
from talkingdit.errors import UserError

if TYPE_CHECKING:
    from talkingdit.pipelines.job import Result

Say = Callable[[dict[str, Any]], None]


class Interrupt:
    """SIGINT, obeyed while a run is at work and again at its next report, should a library have dropped it."""

    def __init__(self) -> None:
        self.working = self.asked = False
        signal.signal(signal.SIGINT, self._hear)

    def _hear(self, *_: object) -> None:
        if self.working and not self.asked:
            self.asked = True
            raise KeyboardInterrupt

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


class Worker:
    """Makes videos with one model.

    Args:
        machine: how it is loaded.
        say: tells the server.
        interrupt: see there.
    """

    def __init__(self, machine: Machine, say: Say, interrupt: Interrupt) -> None:
        self._machine, self._say, self._interrupt = machine, say, interrupt
        self._checkpoint: Any = None

    def run(self, folder: Path, asked: Asked) -> Result:
        """Make the video of a run.

        Raises:
            UserError: something is wrong with what was asked for, or memory runs out.
            KeyboardInterrupt: with a sentence about what is kept.
        """
        prepared = prepare(asked, folder, self._machine)
        outline = prepared.outline
        self._say({"clips": outline.clips, "steps": outline.steps, "work": list(outline.work)})
        self.load(asked, folder)
        self._say({"doing": "hearing the voice"})
        from talkingdit.pipelines.job import Talk

        talk = Talk(progress=self._progress, warn=lambda sentence: self._say({"warning": sentence}))
        variant = prepared.tuning.variant
        return made(prepared.family, self._checkpoint, prepared.inputs, outline, talk=talk, variant=variant)

    def _progress(self, done: int, total: int) -> None:
        self._say({"done": done, "total": total})
        self._interrupt.check()

    def load(self, asked: Asked, folder: Path) -> None:
        """Load the model of a run, if it is not there."""
        if self._checkpoint is not None:
            return
        self._say({"doing": "loading the model"})
        from talkingdit.pipelines.tuning import load_tuned, open_device, usual_device, weights_dtype

        machine, (family, options, tuning) = self._machine, chosen(asked, folder, self._machine)
        device = open_device(machine.device or usual_device(options.small))
        dtype = weights_dtype(machine.dtype, device)
        checkpoint = load_tuned(
            lambda place: family.checkpoint.load_checkpoint(asked.folder, dtype, place),
            tuning,
            device,
            family.units,
            loras_of(asked.options, folder).apply,
        )
        if getattr(options, "compile", False):
            checkpoint.transformer.compile_repeated_blocks(fullgraph=True)
        self._checkpoint = checkpoint


def main() -> None:
    """Work until standard input ends."""
    interrupt = Interrupt()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else writes there is for the log

    def say(event: dict[str, Any]) -> None:
        out.write(json.dumps(event) + "\n")

    importlib.import_module("talkingdit.pipelines.job")  # takes seconds, while nobody has asked for anything yet
    worker = Worker(Machine(**json.loads(sys.argv[1])), say, interrupt)
    while line := sys.stdin.readline():
        order = json.loads(line)
        folder, asked = Path(order["folder"]), Asked(**order["asked"])
        if order["warm"]:
            with contextlib.suppress(Exception):  # the first run tells
                worker.load(asked, folder)
            continue
        interrupt.working, interrupt.asked = True, False
        say(_end(worker, folder, asked, interrupt))


def _end(worker: Worker, folder: Path, asked: Asked, interrupt: Interrupt) -> dict[str, Any]:
    """How a run ended."""
    try:
        result = worker.run(folder, asked)
        return {"end": "done", "took": result.took, "first_after": result.first_after}
    except KeyboardInterrupt:
        return {"end": "stopped"}
    except UserError as error:
        return {"end": "failed", "sentence": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"end": "failed", "sentence": f"{type(error).__name__}: {error} (the server's log has more)."}
    finally:
        interrupt.working = False
        gc.collect()
        _trim()


def _trim() -> None:
    """Give memory back that is free: glibc keeps what a video has let go of, more with each one."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
