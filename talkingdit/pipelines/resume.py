# SPDX-License-Identifier: Apache-2.0
"""Finished clips of a video that is not finished, kept beside it in `<name>.parts/` so that a later run goes on.

    settings.json       what the video is made from and how
    clip-0000.mkv       frames of each finished clip, without loss (FFV1)
    carry-0000.safetensors   what the last finished clip hands on to the next
    lock                which process is at work here; see `talkingdit.lock`

Files appear under their names only when they are complete, the carry of a clip after its frames. A clip counts as
finished when its carry, or that of a later clip, is there. What a killed run leaves besides has a name that begins with
a dot, ours or a library's; such files never stop a run, and those of ours and of safetensors are removed.

The folder may come from somebody else: links in it are not followed, and frames of another size are damage.

Where several processes make a video, rank 0 has the folder, and any other number of them can go on from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from talkingdit.atomic import remove_left, whole_file
from talkingdit.checkpoints.saving import save_tensors
from talkingdit.distributed.team import ALONE, Team
from talkingdit.errors import UserError
from talkingdit.lock import RunLock
from talkingdit.media.checks import reason_of
from talkingdit.media.opening import SCALER_THREADS, as_target
from talkingdit.pipelines.long_video import Carry

Frames = NDArray[np.uint8]
OURS = re.compile(r"settings\.json|clip-\d{4,9}\.mkv|carry-\d{4,9}\.safetensors")
LEFT = re.compile(r"\.tmp\w{6}")  # in the midst of safetensors' save, by earlier versions
LOCK = "lock"
SUM = "sha256"  # of a carry or of the frames of a clip, in its file
NO_FRAMES = b"no frames\n"  # the file of a clip that shows none
MOST_FRAMES = 4096  # of a clip that is read; no model makes as many at once


class ClipStore:
    """The folder of finished clips of one video.

    Args:
        output: the video that is being made.
        settings: what the parts depend on, of plain JSON types. Clips made with others are thrown away.
        warn: called with a sentence when that happens.
        keep: refuse instead of throwing any away.

    Raises:
        UserError: the folder is there but holds something else, cannot be written, or another run is at work there; or
            clips are to be kept that were made with other settings.
    """

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any],
        warn: Callable[[str], None] | None = None,
        keep: bool = False,
    ):
        self.folder = _folder_of(output)
        self.finished = 0
        self._size: list[int] | None = None if "size" not in settings else list(settings["size"])
        self._lock: RunLock | None = None
        try:
            self._lock = _entered(self.folder)
            try:
                self._open(json.loads(json.dumps(settings)), warn, keep)
            except KeyboardInterrupt:
                self.remove_if_empty()
                raise
        except OSError as error:
            if self._lock is not None:
                self.remove_if_empty()
            self.close()
            raise UserError(f"{self.folder}: cannot be written ({error.strerror or error}).") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other runs go on from here."""
        if self._lock is not None:
            self._lock.release()

    def _open(self, settings: dict[str, Any], warn: Callable[[str], None] | None, keep: bool) -> None:
        for left in self.folder.iterdir():
            if LEFT.fullmatch(left.name):
                left.unlink()
        remove_left(self.folder)
        file = self.folder / "settings.json"
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            found = None
        if found == settings:
            self.finished = self._count()
            return
        if (finished := self._count()) and (keep or found is not None):
            before = found if isinstance(found, dict) else {}
            changed = [name for name in {**settings, **before} if before.get(name) != settings.get(name)]
            made = f"was made with another {changed[0] if found is not None and changed else 'program'}"
            if keep:
                raise UserError(
                    f"{self.folder} {made}, and its clips ({finished}) are to be kept: give what they were made with, "
                    "or start over without `--resume`."
                )
            if warn is not None:
                warn(f"{self.folder} {made}; starting over.")
        self._clear()
        with whole_file(file) as path:
            path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")

    def _count(self) -> int:
        carries = [int(path.stem.split("-")[1]) for path in self.folder.glob("carry-*.safetensors")]
        for last in sorted(carries, reverse=True):
            if all(self._clip(index).is_file() for index in range(last + 1)):
                return last + 1
        return 0

    def _clip(self, index: int) -> Path:
        return self.folder / f"clip-{index:04d}.mkv"

    def _carry(self, index: int) -> Path:
        return self.folder / f"carry-{index:04d}.safetensors"

    def add(self, frames: Frames, carry: Carry | None) -> None:
        """Keep the next finished clip: frames [n, H, W, 3], and what it hands on (None after the last clip).

        A clip may show no frames (n = 0), as stages of the work on a video do.

        Raises:
            UserError: the disk is full or cannot be written; the clips before are kept.
        """
        index = self.finished
        tensors = {} if carry is None else carry
        try:
            with whole_file(self._clip(index)) as path:
                if len(frames):
                    _write_lossless(path, frames)
                else:
                    path.write_bytes(NO_FRAMES)
            kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_tensors(kept, self._carry(index), {SUM: _sum(kept)})
            self.finished = index + 1
            if index:
                self._carry(index - 1).unlink(missing_ok=True)
        except (OSError, av.FFmpegError) as error:
            raise UserError(f"{self.folder}: clip {index} cannot be written ({reason_of(error)}).") from error

    def carry(self) -> Carry | None:
        """What the last finished clip hands on; None where there is none.

        Raises:
            UserError: the file is damaged.
        """
        if not self.finished:
            return None
        path = self._carry(self.finished - 1)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
                if (file.metadata() or {}).get(SUM) != _sum(tensors):
                    raise ValueError("not what was written")
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ValueError("not finite")
            return tensors or None
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{path}: damaged; delete {self.folder} to start over.") from error

    def frames(self) -> Iterator[Frames]:
        """Frames of every finished clip that shows any, [n, H, W, 3] each.

        Raises:
            UserError: a file is damaged.
        """
        for index in range(self.finished):
            path = self._clip(index)
            try:
                if path.stat().st_size == len(NO_FRAMES) and path.read_bytes() == NO_FRAMES:
                    continue
                frames = self._decoded(path)
            except (OSError, av.FFmpegError, IndexError, ValueError) as error:
                raise UserError(f"{path}: damaged; delete {self.folder} to start over.") from error
            yield frames

    def _decoded(self, path: Path) -> Frames:
        """Frames of a clip, which are all of the size of the video; ValueError where they are not."""
        with path.open("rb") as file, av.open(file, mode="r", format="matroska") as container:
            stream = container.streams.video[0]
            size = [stream.height, stream.width]  # looked at before there is memory for a frame
            if stream.codec_context.name != "ffv1" or (self._size is not None and size != self._size):
                raise ValueError(f"got {stream.codec_context.name} of {size}")
            wanted = {name.lower(): value for name, value in container.metadata.items()}.get(SUM)
            decoded = islice(container.decode(video=0), MOST_FRAMES)
            frames = [frame.to_ndarray(format="rgb24", threads=SCALER_THREADS) for frame in decoded]
        if not 0 < len(frames) < MOST_FRAMES or any(list(frame.shape[:2]) != size for frame in frames):
            raise ValueError(f"got frames of {[frame.shape for frame in frames[:1]]}")
        found: Frames = np.stack(frames).astype(np.uint8, copy=False)
        if wanted not in (None, _sum_of_frames(found)):  # earlier versions kept none
            raise ValueError("not what was written")
        return found

    def remove(self) -> None:
        """Throw all clips away: the video is finished. Raises nothing where they cannot be removed, or are gone."""
        with contextlib.suppress(OSError):
            self._clear()
        self.close()
        with contextlib.suppress(OSError):  # a file of somebody else is in it, or another run has begun there
            self.folder.rmdir()

    def remove_if_empty(self) -> None:
        """Leave nothing behind where nothing was finished."""
        if not self._count() and self.folder.is_dir():
            self.remove()

    def _clear(self) -> None:
        # Carries first: without them, clips that are left over count for nothing.
        for path in sorted(self.folder.iterdir()):
            if OURS.fullmatch(path.name) or LEFT.fullmatch(path.name):
                path.unlink()
        remove_left(self.folder)


class NoStore:
    """In the place of a `ClipStore` where nothing can be gone on from: clips pass."""

    folder: Path | None = None
    finished = 0

    def carry(self) -> Carry | None:
        return None

    def add(self, frames: Frames, carry: Carry | None) -> None:
        """The clip has been written where it goes."""

    def frames(self) -> Iterator[Frames]:
        return iter(())

    def remove(self) -> None:
        """There is nothing."""

    remove_if_empty = close = remove


class WatchedOnly(NoStore):
    """In the place of a `ClipStore` where a file grows with a voice that nobody can hear again: no other run may write
    the file meanwhile.

    Args:
        output: the video that is being made.

    Raises:
        UserError: another run is at work there, or the folder in which runs meet cannot be made.
    """

    def __init__(self, output: Path) -> None:
        self._place = _folder_of(output)
        try:
            self._lock = _entered(self._place)
        except OSError as error:
            raise UserError(f"{self._place}: cannot be written ({error.strerror or error}).") from error

    def close(self) -> None:
        """Let other runs write the file."""
        self._lock.release()
        with contextlib.suppress(OSError):  # clips of a recording are kept there, or another run has begun
            self._place.rmdir()

    def remove(self) -> None:
        """No clips are kept."""

    remove_if_empty = remove


class SharedClipStore:
    """The finished clips for every process of a team; rank 0 alone touches the disk.

    Args:
        opened: gives the store; called on rank 0.
        team: the processes.

    Attributes:
        finished: clips.
        carry: what the last of them hands on; None where there is none.
        folder: where they are; None on other ranks.

    Raises:
        UserError: from `opened`.
    """

    def __init__(self, opened: Callable[[], ClipStore | NoStore], team: Team = ALONE):
        self.team = team
        self._store: ClipStore | NoStore | None = None

        def found() -> tuple[int, Carry | None]:
            self._store = opened()
            return self._store.finished, self._store.carry()

        try:
            self.finished, self.carry = team.on_rank_0(found)
        except BaseException:
            self.remove_if_empty()
            self.close()
            raise

    @property
    def folder(self) -> Path | None:
        return None if self._store is None else self._store.folder

    @property
    def local(self) -> ClipStore | NoStore:
        """The store, on rank 0."""
        assert self._store is not None
        return self._store

    def add(self, frames: Callable[[], Frames], carry: Carry | None) -> None:
        """Keep the next finished clip, of which rank 0 makes the frames. See `ClipStore.add`."""
        self.team.on_rank_0(lambda: self.local.add(frames(), carry))
        self.finished += 1

    def remove(self) -> None:
        """See `ClipStore.remove`."""
        if self._store is not None:
            self._store.remove()

    def remove_if_empty(self) -> None:
        """See `ClipStore.remove_if_empty`."""
        if self._store is not None:
            self._store.remove_if_empty()

    def close(self) -> None:
        """See `ClipStore.close`."""
        if self._store is not None:
            self._store.close()


def _folder_of(output: Path) -> Path:
    """Where clips of a video are kept. Whoever writes through a link meets those who write to the file."""
    output = Path(os.path.realpath(output)) if output.is_symlink() else output
    return output.with_name(output.name + ".parts")


def _entered(folder: Path) -> RunLock:
    """Make the folder and have it alone, once it is known that nobody else's files are in it.

    Raises:
        UserError: it holds something else, or another run is at work there.
        OSError: it cannot be made; nothing is left of it.
    """
    while True:
        folder.mkdir(exist_ok=True)
        try:
            _refuse(folder, (path for path in folder.iterdir() if not _known(path)))
            lock = RunLock(folder / LOCK, folder, "talkingdit generate")
        except FileNotFoundError:
            continue  # another run has just finished and removed the folder
        except OSError:
            with contextlib.suppress(OSError):  # clips are kept there
                folder.rmdir()
            raise
        try:
            inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
            _refuse(folder, (path for path in inside if path.is_symlink() or path.is_dir()))
        except BaseException:
            lock.release()
            raise
        return lock


def _refuse(folder: Path, foreign: Iterator[Path]) -> None:
    if found := sorted(path.name for path in foreign):
        raise UserError(f"{folder}: expected clips of an unfinished video, got {found[0]!r}; move it away.")


def _known(path: Path) -> bool:
    """May a file of this name be in the folder? A hidden one may, whoever made it."""
    return path.name.startswith(".") or path.name == LOCK or bool(OURS.fullmatch(path.name))


def _sum(tensors: Carry) -> str:
    """Digest of names, shapes, types and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _sum_of_frames(frames: Frames) -> str:
    """Digest of shape and values: what was cut off or changed within a file decodes all the same."""
    found = hashlib.sha256(f"{list(frames.shape)}\n".encode())
    found.update(np.ascontiguousarray(frames).data)
    return found.hexdigest()


def _write_lossless(path: Path, frames: Frames) -> None:
    with av.open(as_target(path), "w", format="matroska") as container:
        container.metadata[SUM] = _sum_of_frames(frames)
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
