# SPDX-License-Identifier: Apache-2.0
"""One run at a time: runs wait here, and a process of its own makes their videos.

A process, because one that is stopped stops, one that dies takes no page with it, and its memory returns when it ends.
It stays as long as runs want the same model, which is loaded once, and goes when nobody has asked for ten minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from talkingdit.app.asked import Asked, Machine, loras_of
from talkingdit.app.runs import Run, Runs, State
from talkingdit.checkpoints.lora_choice import digest_of
from talkingdit.errors import UserError

IDLE = 600.0  # seconds until a worker without work goes
PATIENCE = 30.0  # seconds that a run that is stopped may take; then its process is killed. Finished clips stay
MOST_WAITING = 8  # runs of one person


class WorkerProcess:
    """The process.

    Args:
        machine: how it loads models.
        model: what the runs that it may make have in common.
    """

    def __init__(self, machine: Machine, model: object) -> None:
        self.model = model
        words = [sys.executable, "-m", "talkingdit.app.worker", json.dumps(dataclasses.asdict(machine))]
        # A group of its own: Ctrl-C at the terminal is for the server, which ends the worker itself.
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": _path()},
        )

    def make(self, run: Run, hear: Callable[[dict[str, Any]], None]) -> None:
        """Have the video of a run made; `hear` is told of everything, the end too, also where the process dies."""
        assert self.process.stdout is not None
        self._order(run.folder, run.asked, warm=False)
        for line in self.process.stdout:
            event = json.loads(line)
            hear(event)
            if "end" in event:
                return
        code = self.process.wait()
        reason = "most often memory runs out" if code == -signal.SIGKILL else f"status {code}; see the server's log"
        hear({"end": "failed", "sentence": f"the process that makes the video has ended by itself ({reason})."})

    def warm(self, asked: Asked) -> None:
        """Have the model loaded before anything is to be made."""
        self._order(Path(), asked, warm=True)

    def _order(self, folder: Path, asked: Asked, warm: bool) -> None:
        assert self.process.stdin is not None
        order = {"folder": str(folder), "asked": dataclasses.asdict(asked), "warm": warm}
        with contextlib.suppress(OSError):  # it has died, which whoever reads from it finds out
            self.process.stdin.write(json.dumps(order) + "\n")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()

    def close(self) -> None:
        """End the process, which has nothing to do."""
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _path() -> str:
    """Where the worker finds modules: this package first, as the server stands elsewhere than it was started."""
    own = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])


def model_of(asked: Asked, folder: Path) -> tuple[object, ...]:
    """What runs that one worker makes have in common: how its model is loaded, and what LoRAs are on it.

    Args:
        folder: of the run.
    """
    loras = loras_of(asked.options, folder)
    files = tuple((digest_of(one.path), one.strength) for one in loras.lora)
    options = asked.options
    return asked.checkpoint, options.get("memory") or None, options.get("compile") or None, files, loras.lora_partial


class Queue:
    """Runs that wait, and the one that is at work.

    Args:
        runs: on the disk.
        machine: how models are loaded.
        start: makes a worker.
    """

    def __init__(self, runs: Runs, machine: Machine, start: Callable[[Machine, object], Any] = WorkerProcess) -> None:
        self.runs, self.machine = runs, machine
        self._start = start
        self._changed = threading.Condition(runs.lock)
        self._waiting: list[Run] = []
        self._now: Run | None = None
        self._stopping: set[str] = set()
        self._worker: Any = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="queue", daemon=True)
        self._thread.start()

    def warm(self, asked: Asked) -> None:
        """Have a worker ready for what will most likely be asked for, before it is."""
        with self._changed:
            if self._worker is None and self._now is None:
                self._replace((self.machine, model_of(asked, Path()))).warm(asked)

    def add(self, run: Run) -> None:
        """Make a run wait, or go on.

        Raises:
            UserError: the person has too many that wait.
        """
        with self._changed:
            if sum(one.owner == run.owner for one in self._waiting) >= MOST_WAITING:
                raise UserError(f"run: {MOST_WAITING} of yours are waiting already; stop one or wait.")
            if run is self._now or run in self._waiting:
                raise UserError("run: it is at work already.")
            run.state, run.sentence, run.doing, run.warnings = "waiting", "", "", []
            run.done = run.total = run.clips = run.steps = 0
            run.video.unlink(missing_ok=True)  # what was seen of it before it was stopped; its clips are kept apart
            run.write()
            self._waiting.append(run)
            self._changed.notify_all()

    def before(self, run: Run) -> int:
        """How many runs come before one that waits."""
        with self._changed:
            return self._waiting.index(run) + (self._now is not None) if run in self._waiting else 0

    def stop(self, run: Run) -> None:
        """Stop a run; its finished clips stay."""
        with self._changed:
            if run in self._waiting:
                self._waiting.remove(run)
                self._end(run, "stopped", "stopped before it began.")
            elif run is self._now:
                self._stopping.add(run.id)
                threading.Thread(target=self._insist, args=(run,), daemon=True).start()

    def stopping(self, run: Run) -> bool:
        return run.id in self._stopping

    def _insist(self, run: Run) -> None:
        """Interrupt until the run has ended: at its beginning there is no worker, or one that does not hear yet."""
        until = time.monotonic() + PATIENCE
        while True:
            with self._changed:
                if self._now is not run or not self.stopping(run):
                    return
                if self._worker is not None and time.monotonic() > until:
                    self._worker.kill()
                elif self._worker is not None:
                    self._worker.interrupt()
                self._changed.wait(0.5)

    def close(self) -> None:
        """End the run that is at work and the worker. Those that wait are found again by the next server."""
        with self._changed:
            self._closed = True
            for run in list(self._waiting):
                self._waiting.remove(run)
                self._end(run, "stopped", "the server was closed.")
            if self._now is not None:
                self.stop(self._now)
            self._changed.notify_all()
        self._thread.join(PATIENCE + 10)

    # ---- In the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                idle = time.monotonic() + IDLE
                while not self._waiting and not self._closed:
                    self._changed.wait(IDLE)
                    if self._worker is not None and time.monotonic() >= idle and not self._waiting:
                        self._replace(None)
                if self._closed:
                    self._replace(None)
                    return
                run = self._now = self._waiting.pop(0)
                run.state, run.started, run.doing = "running", time.time(), "starting"
            try:
                run.write()
                self._make(run)
            except Exception as error:  # a full disk, say: the queue goes on
                self._end(run, "failed", f"{type(error).__name__}: {error}.")
            with self._changed:
                self._now = None
                self._stopping.discard(run.id)
                self._changed.notify_all()

    def _make(self, run: Run) -> None:
        model = model_of(run.asked, run.folder)
        if self._worker is None or not self._worker.alive or self._worker.model != model:
            self._replace((self.machine, model))
        self._worker.make(run, lambda event: self._hear(run, event))

    def _replace(self, how: tuple[Machine, object] | None) -> Any:
        """Another worker in the place of the one that there is, or none."""
        if self._worker is not None:
            self._worker.close()
        self._worker = None if how is None else self._start(*how)
        return self._worker

    def _hear(self, run: Run, event: dict[str, Any]) -> None:
        with self._changed:
            for name in ("clips", "steps", "work", "doing", "done", "total", "took", "first_after"):
                if name in event:
                    setattr(run, name, event[name])
            if "done" in event:
                run.doing = "making the frames"
            if "warning" in event:
                run.warnings.append(event["warning"])
            if "end" in event:
                stopped = self.stopping(run) and event["end"] != "done"
                state: State = "stopped" if stopped else event["end"]
                self._end(run, state, "" if stopped else event.get("sentence", ""))

    def _end(self, run: Run, state: State, sentence: str) -> None:
        with self._changed:
            run.doing, run.state = "", state
            kept = run.kept
            kept_words = f"{kept} of {run.clips} clips are kept" if kept else "no clip was finished"
            run.sentence = sentence or (f"stopped; {kept_words}." if state == "stopped" else "")
            with contextlib.suppress(OSError):  # a full disk; the next server says that it was closed
                run.write()
            self._changed.notify_all()
