# SPDX-License-Identifier: Apache-2.0
"""The last stage of a video job: the video from its clips, with its sound, and a preview."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from talkingdit.encoders.speech import Sound, is_long, pieces
from talkingdit.media.files import SPEECH_RATE, VideoWriter
from talkingdit.media.sheet import preview_sheet, sample_frames
from talkingdit.media.style import COLOURS, FAINT
from talkingdit.media.track import EncodedTrack
from talkingdit.pipelines.inputs import Frames, Inputs, Mark, Outline
from talkingdit.pipelines.live import LiveSound

SHEET_FRAMES = 20  # at most, on a preview sheet


class PreviewCurves(Protocol):
    """Curves below the frames of a preview, measured while the frames pass."""

    def add(self, frames: Frames) -> None:
        """The next frames [n, H, W, 3]."""

    def curves(self, sound: Sound, fps: float) -> Mapping[str, NDArray[np.float32]]:
        """Name to [frames] values, of all frames that were added and the sound [samples] at 16 kHz."""


class ShownFrames:
    """The frames that a video shows, of those of its clips: the first one is repeated where the outline says so, and
    what lies behind the end of a voice that was spoken is left out.

    Attributes:
        seen: frames so far.
    """

    def __init__(self, inputs: Inputs, outline: Outline) -> None:
        self._sound, self._outline = inputs.sound, outline
        self.seen = 0

    def of(self, frames: Frames) -> Frames:
        """Those of the next frames [n, H, W, 3] of clips; maybe none."""
        if self.seen == 0 and self._outline.repeated_frames and len(frames):
            frames = np.concatenate([frames[:1].repeat(self._outline.repeated_frames, axis=0), frames])
        if isinstance(self._sound, LiveSound) and self._sound.ended:
            frames = frames[: max(0, self._until_end(self._sound) - self.seen)]
        self.seen += len(frames)
        return frames

    def _until_end(self, sound: LiveSound) -> int:
        """Frames of a video whose voice has ended."""
        return max(1, -(-len(sound) * self._outline.fps // SPEECH_RATE) - self._outline.skipped_frames)


class _Sampled:
    """Frames for the preview, evenly over the video; where its length is not known, over what there has been so far.

    Args:
        count: frames of the video; None where nobody knows.
    """

    def __init__(self, count: int | None) -> None:
        self._wanted = None if count is None else set(sample_frames(count, SHEET_FRAMES).tolist())
        self._step = 1
        self.frames: list[Frames] = []  # [H, W, 3] each
        self.numbers: list[int] = []

    def add(self, first: int, frames: Frames) -> None:
        """Frames [n, H, W, 3] of which the first has this number."""
        for number, frame in enumerate(frames, first):
            if number in self._wanted if self._wanted is not None else number % self._step == 0:
                self.frames.append(frame.copy())
                self.numbers.append(number)
            if self._wanted is None and len(self.numbers) > SHEET_FRAMES:
                self._step *= 2
                self.frames, self.numbers = self.frames[::2], self.numbers[::2]


class VideoSink:
    """Where the frames of a video go, clip by clip: into the file or the pipe, and some of them onto the preview.

    Leaving the `with` block by an exception leaves what `VideoWriter` does, and no preview.

    Args:
        inputs: of the job.
        outline: of the video.
        curves: what the preview shows besides frames and sound.
        started: `time.monotonic()` at the beginning of the job.

    Attributes:
        seen: frames so far.
        first_after: seconds from the beginning of the job until the first frames were written; None before.

    Raises:
        UserError: a target cannot be written.
    """

    def __init__(
        self, inputs: Inputs, outline: Outline, curves: PreviewCurves | None = None, started: float = 0.0
    ) -> None:
        job, skip = inputs.job, Fraction(outline.skipped_frames, outline.fps)
        self._started = started
        self._frames = ShownFrames(inputs, outline)
        self._preview = None if job.sheet is None else PreviewSheet(inputs, outline, curves)
        sound: Any = job.audio
        if isinstance(inputs.sound, LiveSound):
            sound = EncodedTrack(inputs.sound.blocks(skip), SPEECH_RATE, 1)
        name = job.output if job.pipe is None else "standard output"
        live = job.live if job.pipe is None else job.pipe
        self._writer = VideoWriter(
            name, outline.fps, outline.size, sound, upscale=job.upscale, crf=outline.crf, skip=skip, live=live
        )
        self._title = job.output.name if job.pipe is None else "standard output"
        self._sheet, self._live = job.sheet, job.live
        self.first_after: float | None = None

    @property
    def seen(self) -> int:
        return self._frames.seen

    def add(self, frames: Frames) -> None:
        """The frames of the next clip, [n, H, W, 3].

        Raises:
            UserError: they cannot be written.
        """
        frames = self._frames.of(frames)
        if not len(frames):
            return
        self._writer.write(frames)
        if self.first_after is None:
            self.first_after = time.monotonic() - self._started
        if self._preview is not None:
            self._preview.add(frames)

    def __enter__(self) -> VideoSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()

    def hurry(self) -> None:
        """See `VideoWriter.hurry`."""
        self._writer.hurry()

    def abort(self) -> None:
        """See `VideoWriter.abort`."""
        self._writer.abort()

    def finish(self) -> None:
        """End the video, and draw its preview.

        Raises:
            UserError: they cannot be written.
        """
        self._writer.close()
        if self._sheet is not None and self._preview is not None:
            late = f": first frame after {self.first_after:.1f} s" if self._live and self.first_after else ""
            self._preview.draw(self._sheet, self._title + late)


class PreviewSheet:
    """The sheet of a video: some of its frames, its sound, and the curves of its family.

    Args:
        inputs: of the job.
        outline: of the video.
        curves: what is shown besides frames and sound.
    """

    def __init__(self, inputs: Inputs, outline: Outline, curves: PreviewCurves | None = None) -> None:
        self._inputs, self._outline, self._curves = inputs, outline, curves
        self._sampled = _Sampled(None if inputs.job.spoken else outline.frames)
        self._seen = 0

    def add(self, frames: Frames) -> None:
        """The next frames [n, H, W, 3] of the video."""
        self._sampled.add(self._seen, frames)
        if self._curves is not None:
            self._curves.add(frames)
        self._seen += len(frames)

    def draw(self, path: Path, title: str) -> None:
        """Write the PNG.

        Raises:
            UserError: it cannot be written.
        """
        inputs, fps, skip = self._inputs, self._outline.fps, self._outline.skipped_frames
        sound: Sound = _Behind(inputs.sound, skip * SPEECH_RATE // fps) if skip else inputs.sound
        sound = sound if len(sound) else np.zeros(1, np.float32)
        waveform, rate = _outline_of(sound)
        preview_sheet(
            marked(np.stack(self._sampled.frames), self._outline.marks),
            waveform,
            rate,
            float(fps),
            {} if self._curves is None else self._curves.curves(sound, float(fps)),
            path,
            title=title,
            times=[(number + 0.5) / fps for number in self._sampled.numbers],
        )


def write_video(inputs: Inputs, outline: Outline, clips: Iterable[Frames], curves: PreviewCurves | None = None) -> None:
    """Write the video from the frames of its clips and, if the job asks for one, its preview.

    Raises:
        UserError: a target cannot be written, or a kept clip is damaged.
    """
    with VideoSink(inputs, outline, curves) as sink:
        for frames in clips:
            sink.add(frames)


def marked(frames: Frames, marks: Sequence[Mark]) -> Frames:
    """Frames [n, H, W, 3], the first one with boxes and their names."""
    if not marks:
        return frames
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(frames[0])
    draw = ImageDraw.Draw(image)
    thick = max(1, min(image.size) // 60)  # seen also in the small pictures of a sheet
    font = ImageFont.load_default(max(10, min(image.size) // 10))
    for number, mark in enumerate(marks):
        colour = COLOURS[number % len(COLOURS)] if mark.name else FAINT
        draw.rectangle(mark.box, outline=colour, width=thick)
        if mark.name:
            draw.text((mark.box[0] + 2 * thick, mark.box[1] + thick), mark.name, fill=colour, font=font)
    return np.concatenate([np.asarray(image)[None], frames[1:]])


@dataclass(frozen=True)
class _Behind:
    """A sound without its beginning."""

    sound: Sound
    skip: int

    def __len__(self) -> int:
        return max(len(self.sound) - self.skip, 0)

    def __getitem__(self, part: slice) -> Any:
        begin, end, _ = part.indices(len(self))
        return self.sound[begin + self.skip : end + self.skip]


def _outline_of(sound: Sound) -> tuple[NDArray[np.float32], int]:
    """Samples that look like a sound, and their rate: of a long one two for every 10 ms, its highest and lowest."""
    if not is_long(len(sound)):
        return np.asarray(sound[:], dtype=np.float32), SPEECH_RATE
    size = SPEECH_RATE // 100
    found = []
    for piece in pieces(sound):
        parts = np.pad(piece, (0, -len(piece) % size), mode="edge").reshape(-1, size)
        found.append(np.stack([parts.max(1), parts.min(1)], axis=1).reshape(-1))
    return np.concatenate(found), 200
