# SPDX-License-Identifier: Apache-2.0
"""Runs on the disk: a folder each, of a name that nobody guesses, with the files that go in and those that come out.

    run.json      what was asked for, by whom (a digest of the browser's token), and how it went
    image.png, audio.wav, ...     what was uploaded, under names of ours
    video.mp4, sheet.png          what came out; video.mp4.parts/ holds finished clips until it is whole

Everything of a run goes with its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from talkingdit.app.asked import SHEET, VIDEO, Asked
from talkingdit.atomic import whole_file
from talkingdit.errors import UserError
from talkingdit.lock import RunLock

State = Literal["waiting", "running", "done", "stopped", "failed"]
NAME = re.compile(r"[A-Za-z0-9_-]{22}")
SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,11}")
FILE, LOCK = "run.json", "lock"
SHOWN = 50  # runs of a person that are listed


def owner_of(token: str) -> str:
    """Who a browser's token stands for, as it is written down."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass
class Run:
    """A run. The server's threads change it under the lock of `Runs`."""

    id: str
    owner: str
    folder: Path
    asked: Asked
    title: str = ""
    state: State = "waiting"
    sentence: str = ""
    warnings: list[str] = field(default_factory=list)
    doing: str = ""
    done: int = 0
    total: int = 0
    steps: int = 0
    clips: int = 0
    work: list[int] = field(default_factory=list)
    created: float = 0.0
    started: float = 0.0
    took: float = 0.0
    first_after: float | None = None

    @property
    def ended(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    @property
    def video(self) -> Path:
        return self.folder / VIDEO

    @property
    def sheet(self) -> Path:
        return self.folder / SHEET

    @property
    def clip(self) -> int:
        """How many clips have all their steps."""
        reached, finished = 0, 0
        for steps in self.work or [self.steps] * self.clips:
            reached += steps
            finished += reached <= self.done
        return min(finished, self.clips)

    @property
    def kept(self) -> int:
        """Finished clips on the disk, after which the run can go on."""
        carries = self.folder.glob(f"{VIDEO}.parts/carry-*.safetensors")
        return max((int(path.stem.split("-")[1]) + 1 for path in carries), default=0)

    def write(self) -> None:
        """Write run.json, whole."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "folder"}
        values["asked"] = dataclasses.asdict(self.asked)
        with whole_file(self.folder / FILE) as path:
            path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises: ValueError, KeyError, TypeError, OSError: no run is there."""
        values = json.loads((folder / FILE).read_bytes())
        asked = Asked(**values.pop("asked"))
        known = {one.name for one in dataclasses.fields(cls)} - {"folder", "asked", "id"}
        return cls(
            id=folder.name, folder=folder, asked=asked, **{n: v for n, v in values.items() if n in known and n != "id"}
        )


class Runs:
    """All runs of a folder, which one server at a time has.

    Args:
        folder: where they are kept; it is made.

    Raises:
        UserError: it cannot be written, or another server has it.
    """

    def __init__(self, folder: Path) -> None:
        self.lock = threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = RunLock(folder / LOCK, folder, "talkingdit app")
            self._folder = folder / "runs"
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error}).") from error
        self._runs: dict[str, Run] = {}
        for path in self._folder.iterdir():
            self._find(path)

    def _find(self, path: Path) -> None:
        """A run of an earlier server; one that was at work then has stopped."""
        try:
            if not NAME.fullmatch(path.name) or path.is_symlink():
                return
            run = Run.read(path)
            if not run.ended:
                run.state, run.sentence = "stopped", "the server was closed."
                run.write()
            self._runs[run.id] = run
        except (OSError, ValueError, KeyError, TypeError):
            if path.is_dir() and NAME.fullmatch(path.name) and not path.is_symlink() and not (path / FILE).exists():
                shutil.rmtree(path, ignore_errors=True)  # of a server that was killed before the run was there

    def close(self) -> None:
        """Let another server have the folder."""
        self._lock.release()

    def new_folder(self) -> Path:
        """An empty folder for the files of a run that may come."""
        folder = self._folder / secrets.token_urlsafe(16)
        folder.mkdir(mode=0o700)
        return folder

    def add(self, folder: Path, owner: str, asked: Asked, title: str) -> Run:
        """Write a run down."""
        run = Run(folder.name, owner, folder, asked, title=title, created=time.time())
        run.write()
        with self.lock:
            self._runs[run.id] = run
        return run

    def of(self, owner: str) -> list[Run]:
        """The runs of a person, the newest first."""
        with self.lock:
            found = [run for run in self._runs.values() if run.owner == owner]
        return sorted(found, key=lambda run: run.created, reverse=True)[:SHOWN]

    def get(self, id: str, owner: str) -> Run:
        """A run of a person.

        Raises:
            UserError: the person has none of this name.
        """
        with self.lock:
            run = self._runs.get(id)
        if run is None or not secrets.compare_digest(run.owner, owner):
            raise UserError("run: there is none of this name.")
        return run

    def remove(self, run: Run) -> None:
        """Throw a run away that has ended, with all its files."""
        with self.lock:
            if run.ended:
                self._runs.pop(run.id, None)
                shutil.rmtree(run.folder, ignore_errors=True)


def take(source: Path, folder: Path, name: str) -> str:
    """Copy an uploaded file into the folder of a run -> its name there, of which only the ending is the person's.

    Raises:
        UserError: it is no file, or the disk is full.
    """
    ending = source.suffix.lower()
    target = name + (ending if SUFFIX.fullmatch(ending) else "")
    try:
        shutil.copyfile(source, folder / target, follow_symlinks=False)
    except OSError as error:
        raise UserError(f"{name}: the file could not be taken ({error.strerror or error}).") from error
    return target


def take_many(sources: Sequence[Path], folder: Path, name: str) -> Mapping[str, str]:
    """Likewise of several files -> their names here, by those that they had."""
    return {source.name: take(source, folder, f"{name}-{number}") for number, source in enumerate(sources, 1)}


def summary(run: Run) -> dict[str, Any]:
    """A run for programs: plain JSON, no paths."""
    names = ("id", "title", "state", "sentence", "warnings", "done", "total", "clips", "took", "first_after")
    return {**{name: getattr(run, name) for name in names}, "clip": run.clip, "asked": dataclasses.asdict(run.asked)}
