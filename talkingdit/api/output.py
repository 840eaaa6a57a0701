# SPDX-License-Identifier: Apache-2.0
"""A finished video in a program's hands: its frames on the disk rather than in memory, its sound, and files of it."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from talkingdit.api.asking import CheckedCall
from talkingdit.errors import UserError
from talkingdit.pipelines.inputs import Frames, Outline

if TYPE_CHECKING:
    from talkingdit.pipelines.write import PreviewCurves

BLOCK = 32  # frames that are looked at together


class FrameStore:
    """Frames one behind the other in a file without a name, whose room is free again when nobody holds them."""

    def __init__(self, folder: Path, size: tuple[int, int]) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._folder, self._shape, self._count = folder, (*size, 3), 0

    def add(self, frames: Frames) -> None:
        """The next frames [n, H, W, 3].

        Raises:
            UserError: the disk is full.
        """
        if not self._count:
            self._shape = frames.shape[1:]
        data = np.ascontiguousarray(frames).data.cast("B")
        try:
            while data:
                data = data[os.write(self._file.fileno(), data) :]
        except OSError as error:
            raise UserError(f"{self._folder}: the frames do not fit there ({error.strerror or error}).") from error
        self._count += len(frames)

    def array(self) -> Frames:
        """All frames, uint8 [T, H, W, 3]; what is looked at is read from the disk. A write changes this copy alone."""
        if not self._count:
            return np.zeros((0, *self._shape), np.uint8)
        held = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        return np.frombuffer(held, np.uint8).reshape(self._count, *self._shape)


def kept(blocks: Iterable[Frames], folder: Path, size: tuple[int, int]) -> Frames:
    """Blocks of frames as one array on the disk of a folder.

    Raises:
        UserError: the disk is full.
    """
    store = FrameStore(folder, size)
    for frames in blocks:
        store.add(frames)
    return store.array()


@dataclass(frozen=True, kw_only=True)
class TalkingOutput:
    """What a pipeline made.

    Attributes:
        path: the file that was written, if one was asked for and finished.
        fps: frames per second.
        interrupted: somebody has stopped the work; these are the frames of the clips that were finished.
        took: seconds that it took.
    """

    path: Path | None
    fps: int | Fraction
    interrupted: bool
    took: float
    _asked: CheckedCall
    _made: Callable[[], Frames]
    _curves: Callable[[], PreviewCurves | None]

    @cached_property
    def frames(self) -> Frames:
        """The video, uint8 [T, H, W, 3]. It lies on the disk and is read where it is looked at, however long it is.

        Where the call wrote a file itself, frames are read back from it: enlarged if it is, and as H.264 keeps them.
        """
        return self._made()

    @cached_property
    def audio(self) -> tuple[NDArray[np.float32], int]:
        """What is heard from the first frame on: float32 [n, channels] as in the recording, and its rate in Hz."""
        from talkingdit.media.sound import SPEECH_RATE, channel_blocks, sound_form
        from talkingdit.pipelines.live import LiveSound

        inputs, outline = self._asked.inputs, self._asked.outline
        job, skip = inputs.job, Fraction(outline.skipped_frames, outline.fps)
        if isinstance(inputs.sound, LiveSound):
            return np.concatenate(list(inputs.sound.blocks(skip))), SPEECH_RATE
        return np.concatenate(list(channel_blocks(job.audio, None, skip))), sound_form(job.audio)[0]

    @property
    def seconds(self) -> float:
        """That the frames last."""
        return float(len(self.frames) / self.fps)

    def save(self, path: str | os.PathLike[str], upscale: int = 1) -> Path:
        """Write the video with its sound, as `talkingdit generate` does.

        Args:
            path: the .mp4; an existing file is replaced.
            upscale: enlarge the frames so many times.

        Raises:
            UserError: it cannot be written, or is one of the files that the video was made from.
        """
        from talkingdit.media.targets import check_apart
        from talkingdit.pipelines.write import write_video

        target = _named(path, ".mp4", "output")
        inputs = self._asked.inputs
        job = replace(inputs.job, output=target, sheet=None, live=False, pipe=None, upscale=upscale)
        check_apart({"output": target}, self._read)
        write_video(replace(inputs, job=job), self._as_shown, self._blocks())
        return target

    def sheet(self, path: str | os.PathLike[str]) -> Path:
        """Draw a preview: frames, the waveform, and what the family measures.

        Args:
            path: the .png; an existing file is replaced.

        Raises:
            UserError: it cannot be written.
        """
        from talkingdit.media.targets import check_apart, check_writable
        from talkingdit.pipelines.write import PreviewSheet

        target = _named(path, ".png", "sheet")
        check_apart({"sheet": target}, self._read)
        check_writable(target)
        if not len(self.frames):
            raise UserError("sheet: expected a video with frames, got one that was stopped before its first clip.")
        preview = PreviewSheet(self._asked.inputs, self._as_shown, self._curves())
        for frames in self._blocks():
            preview.add(frames)
        preview.draw(target, self._asked.inputs.job.output.name if self.path is None else self.path.name)
        return target

    @property
    def _read(self) -> dict[str, Path | None]:
        """The files that the video was made from, by name."""
        job = self._asked.inputs.job
        return {"image": job.image, "audio": None if job.spoken else job.audio, **self._asked.options.files()}

    @property
    def _as_shown(self) -> Outline:
        """The outline of a video of these frames."""
        return replace(self._asked.outline, repeated_frames=0, frames=len(self.frames), size=self.frames.shape[1:3])

    def _blocks(self) -> Iterator[Frames]:
        for begin in range(0, len(self.frames), BLOCK):
            yield self.frames[begin : begin + BLOCK]


def _named(path: str | os.PathLike[str], ending: str, what: str) -> Path:
    target = Path(path).expanduser()
    if target.suffix.lower() != ending:
        raise UserError(f"{what} {str(target)!r}: expected a name that ends in {ending}, got {target.suffix!r}")
    return target
