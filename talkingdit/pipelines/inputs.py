# SPDX-License-Identifier: Apache-2.0
"""The first stages of a video job: what is asked for, the files that were read for it, and the outline of the video.

Nothing here needs a model, nor torch: everything that can be wrong with files is found before either is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.checkpoints.bounds import MOST_VIDEO
from talkingdit.encoders.speech import Sound, is_long
from talkingdit.errors import UserError
from talkingdit.media.edited import open_edited
from talkingdit.media.files import SPEECH_RATE, read_image, sound_blocks
from talkingdit.media.sound import SHORTEST_AUDIO, check_voice
from talkingdit.media.targets import check_apart, check_writable
from talkingdit.pipelines.live import LiveSound
from talkingdit.pipelines.rows import Rows

Frames = NDArray[np.uint8]
STANDARD_INPUT = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A video that is asked for.

    Args:
        image: the portrait, a file.
        audio: the voice, any format, rate and number of channels; "-" is standard input, of any length.
        output: the .mp4 to write.
        live: the video may be watched while it is made: it grows, fragment by fragment (`media/growing.py`).
        pipe: descriptor of a pipe that it goes into instead of `output`, beside which things are kept meanwhile.
        audio_rate: of raw 16-bit mono sound on standard input, in Hz; None for sound in a container.
        resume: clips that an interrupted run has left are never thrown away: those of other settings are refused.
        sheet: a PNG with a preview to write.
        prompt: what to show.
        upscale: enlarge the frames so many times.
    """

    image: Path
    audio: Path
    output: Path
    sheet: Path | None = None
    prompt: str = ""
    upscale: int = 1
    live: bool = False
    pipe: int | None = None
    audio_rate: int | None = None
    resume: bool = False

    @property
    def spoken(self) -> bool:
        """Does the voice come from a pipe while the video is made?"""
        return str(self.audio) == "-"


@dataclass(frozen=True)
class Inputs:
    """A job whose files were found to be good."""

    job: Job
    image: Frames  # [H, W, 3]
    sound: Sound  # [samples] at 16 kHz: an array, where it is long `Rows` on the disk of the output, or `LiveSound`


@dataclass(frozen=True)
class Mark:
    """A box that the preview shows on its first frame.

    Args:
        name: that stands beside it; "" is a box without one, drawn faint.
        box: x0, y0, x1, y1 in pixels of the video.
    """

    name: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Outline:
    """What video will be made, known before any model is loaded. A family's `outline` makes it.

    Args:
        size: height and width in pixels.
        fps: frames per second, a fraction where a video that is changed has such a rate.
        clips: how many are generated.
        steps: denoising steps per clip.
        predictions: of the model per step, with and without conditions.
        frames: that the video shows.
        clip_frames: that every clip adds, where clips are made one after the other and no more of the voice must be
            known than theirs; 0 where all of it must be.
        overlap_frames: at the end of every clip that the next one makes too and shows; only the last one shows its own.
        repeated_frames: frames at its beginning that repeat the first one.
        skipped_frames: frames' worth of sound that is left out at the beginning.
        settings: what finished clips depend on, by names that a person knows, of plain JSON types.
        crf: quality of the encoder, lower is better.
        warnings: sentences about what is done differently from what may be expected.
        when_too_large: what does not fit where memory runs out, and what to try.
        work: denoising steps of each clip, where they differ; empty: `steps` of each. A clip without any, or one that
            shows no frames, is a stage of the work on a video that is denoised as a whole.
        marks: boxes that the preview shows.
        details: the family's own.
        beside: files that the family writes beside the video and its preview.
    """

    size: tuple[int, int]
    fps: int | Fraction
    clips: int
    steps: int
    predictions: int
    frames: int
    clip_frames: int = 0
    overlap_frames: int = 0
    repeated_frames: int = 0
    skipped_frames: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    crf: int = 16
    warnings: tuple[str, ...] = ()
    when_too_large: str = "its clips"
    work: tuple[int, ...] = ()
    marks: tuple[Mark, ...] = ()
    details: Any = None
    beside: tuple[Path, ...] = ()


def read_inputs(job: Job, others: Mapping[str, Path] | None = None) -> Inputs:
    """Read the portrait and the voice, and check that the results can be written.

    Args:
        others: what else is read, by name; no result may take its place.

    Raises:
        UserError: a file is missing, unreadable, empty or silent, or a target cannot be written, or is one of the files
            that are read.
    """
    if job.output.suffix.lower() != ".mp4":
        raise UserError(f"output {str(job.output)!r}: expected a name that ends in .mp4, got {job.output.suffix!r}")
    if job.sheet is not None and job.sheet.suffix.lower() != ".png":
        raise UserError(f"sheet {str(job.sheet)!r}: expected a name that ends in .png, got {job.sheet.suffix!r}")
    read = {"image": job.image, "audio": None if job.spoken else job.audio, **(others or {})}
    check_apart({"output": job.output, "sheet": job.sheet}, read)
    for target in (job.output, *([] if job.sheet is None else [job.sheet])):
        check_writable(target)
    image = first_picture(job.image) if job.image == (others or {}).get("video") else read_image(job.image)
    if job.spoken:
        sound = LiveSound(STANDARD_INPUT, job.output.parent, job.audio_rate)
        # If nothing ever comes, or too little, that is told before a model is loaded.
        sound.wait(math.ceil(SHORTEST_AUDIO * SPEECH_RATE))
        return Inputs(job, image, sound)
    return Inputs(job, image, read_voice(job.audio, job.output.parent))


def first_picture(path: Path) -> Frames:
    """The first picture of a video, which stands for the portrait where the video is changed.

    Raises:
        UserError: no such file, or not a video.
    """
    return next(open_edited(path).read(0, 1))


def check_enlarged(job: Job, outline: Outline) -> None:
    """Are the enlarged frames of a video no larger than those of any?

    Raises:
        UserError: they are.
    """
    height, width = outline.size
    most = max(1, math.isqrt(MOST_VIDEO // (height * width)))
    if not 1 <= job.upscale <= most:
        raise UserError(
            f"upscale: must be 1 to {most} for frames of {width} x {height}, as H.264 has at most {MOST_VIDEO} pixels, "
            f"got {job.upscale}."
        )


def check_heard(job: Job, outline: Outline) -> None:
    """Can the video be made while its voice is spoken, if that is asked for?

    Raises:
        UserError: it cannot.
    """
    if job.spoken and not outline.clip_frames:
        raise UserError(
            "audio -: expected a voice from a file, as this model must have all of it before it makes the first frame."
        )


def read_voice(path: Path, folder: Path) -> Sound:
    """A voice [samples] float32 at 16 kHz, mono, of which never more than some minutes are in memory.

    Args:
        path: any sound file.
        folder: where a long one is kept, see `Rows`.

    Raises:
        UserError: as `read_audio`, or the disk is full.
    """
    held: list[NDArray[np.float32]] = []
    rows: Rows | None = None
    count = 0
    for block in voice_blocks(path):
        held.append(block)
        count += len(block)
        if rows is None and is_long(count):
            rows = Rows(folder)
        if rows is not None:
            for part in held:
                rows.append(part)
            held = []
    return np.concatenate(held) if rows is None else rows


def voice_blocks(path: Path) -> Iterator[NDArray[np.float32]]:
    """A voice as float32 [n] at 16 kHz, mono, block by block.

    Raises:
        UserError: as `read_audio`; what only the whole tells, behind the last block.
    """
    count, peak = 0, 0.0
    for block in sound_blocks(path, SPEECH_RATE):
        count, peak = count + len(block), max(peak, float(np.abs(block).max(initial=0)))
        yield block
    check_voice(path, count, SPEECH_RATE, peak)
