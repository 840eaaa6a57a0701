# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint: written beside its name, listed with their checksums, looked over before they are read."""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from talkingdit.atomic import put_in_place, sync_to_disk

MANIFEST, PLAIN, CONFIG = "files.json", "state.pt", "config.json"
UNFINISHED = ".tmp"  # how the name of a checkpoint ends that is being written or removed


class _Written(list[WriteResult]):
    """What a rank wrote; the sizes and checksums of its files travel to rank 0 with it."""

    files: dict[str, dict[str, int]]


class CheckpointWriter(dcp.FileSystemWriter):
    """Writes beside the final name; when all ranks have written, rank 0 completes the folder and renames it."""

    def __init__(
        self, final: Path, plain: bytes, config: Callable[[Path], None] | None, completed: Callable[[], None]
    ) -> None:
        super().__init__(final.with_name(final.name + UNFINISHED))
        self.final, self._plain, self._config, self._completed = final, plain, config, completed

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The copy that is written asynchronously, taken before training goes on."""
        return {name: _copied(tensor) for name, tensor in state_dict.items()}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            written = _Written(super().write_data(plan, planner).value())
        except Exception as error:  # torch.save covers the error of a full disk with one about positions in its file
            raise _first_os_error(error) from error
        names = {result.storage_data.relative_path for result in written}
        written.files = {name: _entry(Path(self.path) / name) for name in sorted(names)}
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        folder = Path(self.path)
        super().finish(metadata, results)
        _write(folder / PLAIN, self._plain)
        if self._config is not None:
            self._config(folder / CONFIG)
            sync_to_disk(folder / CONFIG)
        files = {
            name: entry for written in results if isinstance(written, _Written) for name, entry in written.files.items()
        }
        for path in sorted(folder.iterdir()):
            if path.name in (".metadata", PLAIN, CONFIG):
                files[path.name] = _entry(path)
        _write(folder / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1).encode())
        put_in_place(folder, self.final)
        self._completed()


def damage(folder: Path, only: str | None, rank: int, world: int, verify: bool) -> str | None:
    """What is wrong with a checkpoint's files, by the list in it; None if nothing is.

    Args:
        only: look at this file alone.
        rank, world: each rank looks at some of them otherwise.
        verify: compare checksums too, not only sizes.
    """
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name in [only] if only else sorted(files)[rank::world]:
            if Path(name).name != name or not name:
                return f"{MANIFEST} names {name!r}, which is no file of the checkpoint"
            if not stat.S_ISREG((folder / name).stat().st_mode):
                return f"{name} is not a file"
            expected, size = files[name], (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if verify and _checksum(folder / name) != expected["crc32"]:
                return f"the checksum of {name} is not the one it was written with"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def _first_os_error(error: BaseException) -> BaseException:
    """The error of the operating system behind this one, if there is one."""
    earlier: BaseException | None = error
    while earlier is not None:
        if isinstance(earlier, OSError):
            return earlier
        earlier = earlier.__cause__ or earlier.__context__
    return error


@torch.no_grad()
def _copied(tensor: Any) -> Any:
    """A copy on the host. Of tensors made of tensors, sharded or quantised, the inner ones are copied."""
    if not isinstance(tensor, Tensor):
        return tensor  # the mesh of a sharded one
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.detach().to("cpu", copy=True)
    names, kind = tensor.__tensor_flatten__()
    inner = {name: _copied(getattr(tensor, name)) for name in names}
    return type(tensor).__tensor_unflatten__(inner, kind, tensor.shape, tensor.stride())


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def _entry(file: Path) -> dict[str, int]:
    return {"bytes": file.stat().st_size, "crc32": _checksum(file)}


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as handle:
        while block := handle.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
