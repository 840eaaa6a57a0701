# SPDX-License-Identifier: Apache-2.0
"""What the page and programs ask the app to do, in one place: start, find, stop and go on with runs, and plan them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkingdit import families
from talkingdit.app.asked import Asked, Machine, Text, prepare
from talkingdit.app.guard import Shares, token_in
from talkingdit.app.planning import plan
from talkingdit.app.queue import Queue
from talkingdit.app.runs import Run, Runs, owner_of, take
from talkingdit.errors import UserError

Fill = Callable[[Path], Mapping[str, Text]]  # takes files into a folder -> options as typed


@dataclass(frozen=True)
class Visitor:
    """Who asks: the token of a browser or a program, and what its runs are known by."""

    token: str

    @property
    def owner(self) -> str:
        return owner_of(self.token)

    @classmethod
    def of(cls, request: Any) -> Visitor:
        """From gradio's or starlette's request.

        Raises:
            UserError: it has no token; the guard lets no such request pass.
        """
        token = token_in({name.lower(): value for name, value in request.headers.items()})
        if not token:
            raise UserError("the request has no token.")
        return cls(token)


@dataclass(frozen=True)
class Wish:
    """What somebody wants, with files where gradio keeps them.

    Args:
        image, audio: uploaded files.
        prompt: what to show.
        checkpoint: folder; "" is the model that ships.
        fill: takes the files of options, and gives options.
    """

    image: str | None
    audio: str | None
    prompt: str
    checkpoint: str
    fill: Fill

    def asked(self, folder: Path) -> Asked:
        """The same with files in a folder."""
        return Asked(
            image=take(Path(self.image), folder, "image") if self.image else "",
            audio=take(Path(self.audio), folder, "audio") if self.audio else "",
            prompt=self.prompt.strip(),
            checkpoint=self.checkpoint,
            options=dict(self.fill(folder)),
        )


class Service:
    """The app without its page.

    Args:
        runs, queue: see there.
        machine: how models are loaded.
        checkpoints: folders that may be used; "" is the model that ships.
        any_checkpoint: others may be named, too.
        scratch: folder for files of plans.
    """

    def __init__(
        self,
        runs: Runs,
        queue: Queue,
        machine: Machine,
        checkpoints: Sequence[str],
        any_checkpoint: bool,
        scratch: Path,
    ) -> None:
        self.runs, self.queue, self.machine = runs, queue, machine
        self.checkpoints, self.any_checkpoint = tuple(checkpoints), any_checkpoint
        self.shares = Shares()
        self._scratch = scratch

    def start(self, person: Visitor, wish: Wish) -> Run:
        """Begin a run, or have it wait. Nothing is left of one that is not possible.

        Raises:
            UserError: it is not.
        """
        self.check_checkpoint(wish.checkpoint)
        folder = self.runs.new_folder()
        try:
            asked = wish.asked(folder)
            prepare(asked, folder, self.machine)
            run = self.runs.add(folder, person.owner, asked, self._title(wish, asked))
            try:
                self.queue.add(run)
            except UserError:
                self.queue.stop(run)
                run.state = "stopped"
                self.runs.remove(run)
                raise
        except UserError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(str(error).replace(f"{folder}/", "")) from error  # where it lies is nobody's business
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(f"the run could not be written ({error.strerror or error}).") from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return run

    def _title(self, wish: Wish, asked: Asked) -> str:
        words = asked.prompt or (Path(wish.audio).stem if wish.audio else "") or "video"
        return words if len(words) <= 40 else words[:39].rstrip() + "…"

    def plan(self, person: Visitor, wish: Wish) -> str:
        """What it would take, in words.

        Raises:
            UserError: it is not possible.
        """
        self.check_checkpoint(wish.checkpoint)
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            folder = Path(name)
            return plan(wish.asked(folder), folder, self.machine, self.runs.of(person.owner))

    def check_checkpoint(self, folder: str) -> None:
        """Raises: UserError: a folder that may not be used, or is no checkpoint."""
        if folder not in self.checkpoints and not self.any_checkpoint:
            raise UserError("checkpoint: expected one of those that the server offers.")
        self.family(folder)

    def family(self, checkpoint: str) -> families.Family:
        """Of a checkpoint. Raises: UserError: it is none."""
        return Asked(checkpoint=checkpoint).family()

    def go_on(self, person: Visitor, id: str) -> Run:
        """Go on with a run that was stopped or has failed, after its last clip.

        Raises:
            UserError: there is none of this name, or it is done.
        """
        run = self.runs.get(id, person.owner)
        if run.state not in ("stopped", "failed"):
            raise UserError("run: expected one that was stopped, to go on with.")
        self.queue.add(run)
        return run

    def newest(self, person: Visitor) -> Run | None:
        """The run that a person sees first: one that is not at its end, else the last one."""
        mine = self.runs.of(person.owner)
        return next((run for run in reversed(mine) if not run.ended), mine[0] if mine else None)

    def find(self, person: Visitor, id: str | None) -> Run | None:
        """A run of a person, None where there is none."""
        with contextlib.suppress(UserError):
            return self.runs.get(id or "", person.owner)
        return None

    def give(self, path: Path, person: Visitor, cache: str) -> str:
        """A file where gradio may hand it to this person."""
        from gradio.processing_utils import save_file_to_cache

        given = save_file_to_cache(path, cache)
        self.shares.add(given, person.token)
        return given
