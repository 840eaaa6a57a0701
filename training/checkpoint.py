# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run on any number of processes: complete or absent, read back on any other layout.

torch.distributed.checkpoint (DCP) writes the tensors: every rank its own shards, in a thread while training goes on.
What is added here is what a run needs beside that. A checkpoint grows in `step-00001000.tmp`; when every rank's files
are on disk, rank 0 adds what is not a tensor and a list of all files with their checksums, and renames the folder. A
kill at any moment, of any ranks, leaves either a `.tmp`, which the next start removes, or a complete checkpoint.

    step-00001000/
        .metadata, __0_0.distcp, ...   DCP: tensors by name, `networks/transformer.blocks.0.self_attn.q.weight`
        state.pt                       numbers, the position in the data, stage, random states (torch.load)
        config.json                    the configuration of the run
        files.json                     bytes and CRC-32 of all others

A checkpoint may come from somebody else: `.metadata` and `state.pt` are read without running code
(checkpoint_metadata.py and torch's weights_only), and files are looked for by plain names in the folder alone.
"""

from __future__ import annotations

import io
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.stateful import Stateful

from talkingdit.atomic import remove_whole
from talkingdit.distributed.team import from_all_ranks, from_rank_0
from talkingdit.errors import UserError
from training.checkpoint_files import MANIFEST, PLAIN, UNFINISHED, CheckpointWriter, damage
from training.checkpoint_metadata import CheckpointReader, read_metadata

T = TypeVar("T")
# Without a process group DCP warns that it works in one process, which is what is wanted, also from its thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module=r"torch\.distributed\.checkpoint")
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(UserError):
    """A checkpoint could not be written, is damaged, or is of another run. The message is one sentence."""


class Checkpoints:
    """The checkpoints in one folder that all processes see. Every method is called by every rank, in the same order.

    Args:
        folder: where checkpoints lie; made if it does not exist. What an interrupted save left there is removed.
        keep: how many complete checkpoints stay, the newest; 0 for all. An old one goes when a new one is complete.
        asynchronous: `save` returns when the state is copied to the host (as much host memory as the shards of this
            rank take); a thread writes it. Otherwise `save` returns when the checkpoint is complete.
        config: written by `config(file)` beside every checkpoint: `lambda file: write_json(config, file)`.
        read_only: for looking at the checkpoints of a run that may be going on: nothing is removed.
        verify: `load` compares the checksum of every file (read once more, shared between the ranks), not only sizes.
        timeout: seconds that a rank waits for the others.

    Raises:
        UserError: for a negative `keep`.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 3,
        asynchronous: bool = True,
        config: Callable[[Path], None] | None = None,
        read_only: bool = False,
        verify: bool = True,
        timeout: float = 1800.0,
    ) -> None:
        if keep < 0:
            raise UserError(f"checkpoint: keep must be 0 (all) or more, got {keep}")
        self.folder, self.keep, self.asynchronous, self.verify = Path(folder), keep, asynchronous, verify
        self._config = config
        self._pending: tuple[int, Future[Any]] | None = None
        # A group of its own, on the host: the thread that writes talks to the others while training does, too.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if _distributed() else None
        self._rank = dist.get_rank() if _distributed() else 0
        self._world = dist.get_world_size() if _distributed() else 1
        if not read_only:
            self._from_rank_0(self._clean)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes the state as the checkpoint of this step, or does nothing if that is complete already.

        Args:
            state: by name: objects with `state_dict()` (ModelState, OptimizerState, Ema), tensors, and anything else
                that torch.load(weights_only=True) reads, such as the position in the data. What is not sharded must be
                the same in every rank. Python's and torch's random states are added.

        Raises:
            CheckpointError: this or, when asynchronous, the previous checkpoint could not be written. The complete
                ones stay.
        """
        self.wait()
        final = self.folder / f"step-{step:08d}"
        if self._from_rank_0(lambda: (final / MANIFEST).exists()):
            return
        tensors: dict[str, Tensor] = {}
        plain = {key: _split(value, key, tensors) for key, value in state.items()}
        content = io.BytesIO()
        torch.save({"step": step, "state": plain, "random": self._random_states()}, content)
        writer = CheckpointWriter(final, content.getvalue(), self._config, lambda: self._purge(final))
        distributed: dict[str, Any] = {"process_group": self._group, "no_dist": self._group is None}
        if self.asynchronous:
            pending = dcp.async_save(tensors, storage_writer=writer, **distributed)
            assert isinstance(pending, Future)
            self._pending = step, pending
            return
        try:
            dcp.save(tensors, storage_writer=writer, **distributed)
        except CheckpointException as error:
            self._fail(step, error)

    def load(self, state: dict[str, Any], partly: bool = False) -> int | None:
        """Reads the newest complete checkpoint into `state`, whatever layout wrote it.

        Objects with `load_state_dict()` and tensors are filled in place; the value of every other key is replaced.
        Random states return where the number of processes is the same.

        Args:
            partly: the checkpoint may hold more than `state`; random states stay as they are.

        Returns:
            its step; None if there is no checkpoint.

        Raises:
            CheckpointError: a file is damaged (which one), or the checkpoint holds other tensors than `state` (which).
        """
        self.wait()
        path = self.latest()
        if path is None:
            return None
        self._check_files(path)
        saved = _sizes(path)
        content = _content(path)
        differing = sorted(state.keys() - content["state"].keys() if partly else content["state"].keys() ^ state.keys())
        if differing:
            where = "lacks" if differing[0] in state else "holds"
            raise CheckpointError(f"checkpoint {path} is of another run: it {where} {differing[0]!r}")
        tensors: dict[str, Tensor] = {}
        for key, value in state.items():
            if isinstance(value, PreparedState):
                value.prepare({name.removeprefix(f"{key}/") for name in saved if name.startswith(f"{key}/")})
            _split(value, key, tensors)
        if partly:
            saved = {name: shape for name, shape in saved.items() if name.split("/")[0] in state}
        _compare(path, saved, tensors)
        try:
            reader = CheckpointReader(path)
            dcp.load(tensors, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            rank, cause = _cause(error)
            raise CheckpointError(f"checkpoint {path} cannot be read by rank {rank}: {cause}") from error
        for key, value in state.items():
            whole = _join(content["state"][key], key, tensors)
            if isinstance(value, Stateful):
                with restoring(path, key):
                    value.load_state_dict(whole)
            else:
                state[key] = whole
        if len(content["random"]) == self._world and not partly:
            with restoring(path, "random"):
                _set_random_state(content["random"][self._rank])
        return int(content["step"])

    def peek(self) -> dict[str, Any] | None:
        """What is not a tensor in the newest complete checkpoint, and its `step`: which stage to prepare for."""
        self.wait()
        path = self.latest()
        if path is None:
            return None
        self._check_files(path, only=PLAIN)
        content = _content(path)
        return {**content["state"], "step": content["step"]}

    def latest(self) -> Path | None:
        """The newest complete checkpoint, as rank 0 sees the folder; None if there is none."""
        self.wait()
        return self._from_rank_0(lambda: next(reversed(self._complete()), None))

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is complete.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except CheckpointException as error:
            self._fail(step, error)

    def close(self) -> None:
        """Waits, then gives up the process group; before the default group is destroyed."""
        self.wait()
        if self._group is not None:
            dist.barrier(self._group)
            dist.destroy_process_group(self._group)
            self._group = None

    def _complete(self) -> list[Path]:
        return _complete(self.folder)

    def _clean(self) -> None:
        """Removes what a killed save left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"step-*{UNFINISHED}"):
            if _NAME.fullmatch(path.stem):
                shutil.rmtree(path)

    def _purge(self, newest: Path) -> None:
        """Removes old checkpoints, renamed first: half of one must not pass for a checkpoint."""
        older = [path for path in self._complete() if path != newest]
        for path in older[: max(0, len(older) - self.keep + 1)] if self.keep else []:
            remove_whole(path, UNFINISHED)

    def _fail(self, step: int, error: CheckpointException) -> NoReturn:
        """Gives the disk space back and tells why there is no checkpoint."""
        rank, cause = _cause(error)
        name = f"step-{step:08d}"
        self._from_rank_0(lambda: shutil.rmtree(self.folder / f"{name}{UNFINISHED}", ignore_errors=True))
        newest = self.latest()
        rest = "there is no complete one" if newest is None else f"the newest complete one is {newest.name}"
        raise CheckpointError(
            f"checkpoint {name} could not be written to {self.folder} by rank {rank}: {cause}; {rest}"
        ) from error

    def _check_files(self, path: Path, only: str | None = None) -> None:
        """Compares files with the list in the checkpoint, each rank some of them; all ranks raise alike."""
        found = damage(path, only, self._rank, self._world, self.verify)
        if damages := [text for text in from_all_ranks(found, self._group) if text is not None]:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {damages[0]}; remove it to continue from the one before"
            )

    def _random_states(self) -> list[Any]:
        """Of every rank."""
        own = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            own["cuda"] = torch.cuda.get_rng_state()
        return from_all_ranks(own, self._group)

    def _from_rank_0(self, function: Callable[[], T]) -> T:
        """Runs the function in rank 0 and gives its result, or its error, to all."""

        def told() -> T:
            try:
                return function()
            except Exception as error:
                raise CheckpointError(f"checkpoint folder {self.folder}: {error}") from error

        try:
            return from_rank_0(told, self._group)
        except UserError as error:  # on the other ranks its sentence came alone
            raise CheckpointError(str(error)) from error


class PreparedState(Stateful):
    """A Stateful that is told, before a load asks for its `state_dict()`, which tensors the checkpoint holds for it."""

    def prepare(self, saved: set[str]) -> None:
        """Makes the tensors of these names exist."""
        raise NotImplementedError


def newest_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; None if there is none."""
    return next(reversed(_complete(folder)), None)


def check_shapes(path: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Does a checkpoint hold these tensors, and no others, as what it calls `name`? They may be on the meta device.

    Raises:
        CheckpointError: says what differs.
    """
    saved = {key: shape for key, shape in _sizes(path).items() if key.startswith(f"{name}/")}
    _compare(path, saved, {f"{name}/{key}": tensor for key, tensor in tensors.items()})


def _complete(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / MANIFEST).exists()), key=lambda path: int(path.name[5:]))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What of a value is not DCP's; the tensors of objects with a state are put into `tensors` by their path."""
    if isinstance(value, Stateful):
        return _split_tree(value.state_dict(), name, tensors)
    return _split_tree(value, name, tensors) if isinstance(value, Tensor) else value


def _split_tree(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return None
    if isinstance(value, dict):
        return {key: _split_tree(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        raise TypeError(f"checkpoint: {name} is a list of tensors; a dictionary is needed")
    return value


def _join(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Undoes `_split`."""
    if name in tensors:
        return tensors[name]
    if isinstance(value, dict):
        return {key: _join(item, f"{name}/{key}", tensors) for key, item in value.items()}
    return value


@contextmanager
def restoring(path: Path | str, what: str) -> Iterator[None]:
    """Where a state from a checkpoint is taken over: one that does not fit is told in one sentence.

    Raises:
        CheckpointError: for what code does that was given something else than it wrote.
    """
    try:
        yield
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"checkpoint {path}: what it holds as {what!r} is not that of a run ({type(error).__name__}: {reason})"
        ) from error


def _content(path: Path) -> dict[str, Any]:
    """What is not a tensor in a checkpoint."""
    try:
        content = torch.load(path / PLAIN, weights_only=True, map_location="cpu")
    except Exception as error:  # an unpickler raises whatever comes to its mind
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"checkpoint {path}: {PLAIN} is not that of a run ({reason})") from error
    kinds = {"step": int, "state": dict, "random": list}
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        raise CheckpointError(f"checkpoint {path}: {PLAIN} is not that of a run (step, state and random are expected)")
    return content


def _sizes(path: Path) -> dict[str, torch.Size]:
    """Shapes of the tensors in a checkpoint."""
    try:
        metadata = read_metadata(path).state_dict_metadata
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    return {name: entry.size for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def _compare(path: Path, saved: dict[str, torch.Size], wanted: dict[str, Tensor]) -> None:
    """Raises one sentence that names what differs."""
    differences = []
    for verb, names in (("lacks", wanted.keys() - saved.keys()), ("also holds", saved.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            differences.append(f"it {verb} {min(names)}{more}")
    shapes = [name for name in sorted(wanted.keys() & saved.keys()) if wanted[name].shape != saved[name]]
    if shapes:
        name, more = shapes[0], f" and {len(shapes) - 1} more differ" if len(shapes) > 1 else ""
        differences.append(f"{name} is {list(saved[name])} there and {list(wanted[name].shape)} here{more}")
    if differences:
        raise CheckpointError(f"checkpoint {path} is of another model or stage: {', '.join(differences)}")


def _cause(error: CheckpointException) -> tuple[int, str]:
    """The rank that failed first in order, and why, in words."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, OSError) and cause.strerror:
        return rank, cause.strerror
    return rank, f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
