# SPDX-License-Identifier: Apache-2.0
"""The whole job, files in and files out: portrait and voice to an .mp4 with sound, and a preview sheet if wanted.

Everything that can be wrong with the files is found by `prepare`, before a model is loaded. Pictures go from the
decoder straight to the writer, which gives the file its name only when it is complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.distributed.layout import Parallel
from talkingdit.encoders.log_mel import normalise_loudness
from talkingdit.errors import UserError
from talkingdit.families.puppet.checkpoint import PuppetCheckpoint
from talkingdit.families.puppet.pipeline import Frames, PuppetPipeline, Sampling, fit_portrait
from talkingdit.media.files import SPEECH_RATE, VideoWriter, check_writable, read_audio, read_image
from talkingdit.media.sheet import preview_sheet, sample_frames

SHEET_PICTURES = 20  # at most, on a preview sheet


@dataclass(frozen=True)
class Inputs:
    """Files that were found to be good."""

    image: Frames  # [H, W, 3]
    waveform: NDArray[np.float32]  # [n] at 16 kHz, loudness normalised
    sound: NDArray[np.float32]  # the same as it is in the file
    image_file: Path
    audio_file: Path
    output: Path
    sheet: Path | None


@dataclass(frozen=True)
class Outline:
    """What video will be made, known before any model is loaded. A family's `outline` makes it.

    Args:
        size: height and width in pixels.
        fps: frames per second.
        clips: how many are generated.
        steps: denoising steps per clip.
        predictions: of the model per step, with and without conditions.
        frames: that the video shows.
        lead: frames at its beginning that repeat the first one.
        skip: frames' worth of sound that is left out at the beginning.
        settings: what finished clips depend on, by names that a person knows, of plain JSON types.
        warnings: sentences about what is done differently from what may be expected.
        details: the family's own.
    """

    size: tuple[int, int]
    fps: int
    clips: int
    steps: int
    predictions: int
    frames: int
    lead: int = 0
    skip: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    details: Any = None


@dataclass(frozen=True)
class Result:
    """What was made."""

    path: Path
    frames: int
    fps: int
    took: float  # seconds

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


def prepare(image: Path, audio: Path, output: Path, sheet: Path | None = None) -> Inputs:
    """Read the portrait and the voice, and check that the results can be written.

    Args:
        image: the portrait, any size; its middle square is used.
        audio: the voice, any format, rate and number of channels.
        output: the .mp4 to write.
        sheet: a picture with the preview to write.

    Raises:
        UserError: a file is missing, unreadable, empty or silent, or a target cannot be written.
    """
    if output.suffix.lower() != ".mp4":
        raise UserError(f"output {str(output)!r}: expected a name that ends in .mp4, got {output.suffix!r}")
    for target in (output, *([] if sheet is None else [sheet])):
        check_writable(target)
    picture, sound = read_image(image), read_audio(audio, SPEECH_RATE)
    return Inputs(picture, normalise_loudness(sound), sound, image, audio, output, sheet)


def make_video(
    inputs: Inputs,
    checkpoint: PuppetCheckpoint,
    prompt: str = "",
    sampling: Sampling | None = None,
    upscale: int = 1,
    progress: Callable[[int], None] | None = None,
    warn: Callable[[str], None] | None = None,
    parallel: Parallel | None = None,
) -> Result:
    """Generate the video and write it.

    Args:
        inputs: from `prepare`.
        checkpoint: from `load_checkpoint`.
        prompt: what to show.
        sampling: guidance, steps and seed.
        upscale: enlarge the pictures so many times.
        progress: called after every denoising step with the number of all steps.
        warn: called with a sentence about what was done differently from what may be expected.
        parallel: how several processes share the work. Each calls this with the same inputs; the first alone reads
            and writes files, and only there `progress` and `warn` are called.

    Raises:
        UserError: the video cannot be written.
        OtherRankError: where something went wrong in another process.
    """
    started = time.monotonic()
    parallel = Parallel() if parallel is None else parallel
    team = parallel.team
    if team.rank:
        progress = warn = None
    pipeline = PuppetPipeline(checkpoint, parallel)
    settings = pipeline.settings
    sampling = Sampling() if sampling is None else sampling
    portrait, cropped = fit_portrait(inputs.image, settings.size)
    unknown = checkpoint.text_encoder.unknown_words(prompt)
    if warn is not None:
        if cropped:
            height, width = inputs.image.shape[:2]
            warn(f"{inputs.image_file} is {width} x {height} pixels; only its middle square is used.")
        if unknown:
            warn(f"the prompt has words that this model does not know: {', '.join(unknown)}.")
    features, frames = team.first(lambda: pipeline.features(inputs.waveform))
    steps = pipeline.clips(frames) * (sampling.steps or settings.steps)
    advance = None if progress is None else (lambda: progress(steps))
    preview = _Preview(frames)
    size = (settings.size, settings.size)
    with ExitStack() as open_files:
        writer: VideoWriter | None = None

        def begin() -> None:
            nonlocal writer
            writer = VideoWriter(inputs.output, settings.fps, size, audio=inputs.audio_file, upscale=upscale)
            open_files.enter_context(writer)

        def keep(pictures: Frames) -> None:
            assert writer is not None
            writer.write(pictures)
            if inputs.sheet is not None:
                preview.add(pictures)

        def finish() -> None:
            open_files.close()
            if inputs.sheet is not None:
                preview.save(inputs, settings.fps)

        team.first(begin)
        for pictures in pipeline.generate(portrait, features, prompt, sampling, advance, frames):
            team.first(lambda pictures=pictures: keep(pictures))  # type: ignore[misc]
        team.first(finish)
    return Result(inputs.output, frames, settings.fps, time.monotonic() - started)


class _Preview:
    """What the sheet shows of a video that streams by: a few pictures and the mouth measured in all of them."""

    def __init__(self, frames: int):
        self._wanted = sample_frames(frames, SHEET_PICTURES)
        self._pictures: list[Frames] = []
        self._mouth: list[NDArray[np.float32]] = []
        self._seen = 0

    def add(self, frames: Frames) -> None:
        from talkingdit.puppets.probe import CLOSED_HEIGHT, OPENING_HEIGHT, measure_height

        here = self._wanted[(self._wanted >= self._seen) & (self._wanted < self._seen + len(frames))]
        self._pictures.append(frames[here - self._seen])
        self._mouth.append(((measure_height(frames) - CLOSED_HEIGHT) / OPENING_HEIGHT).astype(np.float32))
        self._seen += len(frames)

    def save(self, inputs: Inputs, fps: int) -> None:
        from talkingdit.puppets.visemes import visemes_from_audio

        assert inputs.sheet is not None
        preview_sheet(
            np.concatenate(self._pictures),
            inputs.waveform,
            SPEECH_RATE,
            fps,
            {
                "mouth in the video": np.concatenate(self._mouth),
                "mouth of the voice": visemes_from_audio(inputs.waveform, fps, self._seen).opening,
            },
            inputs.sheet,
            title=inputs.output.name,
            times=[(int(i) + 0.5) / fps for i in self._wanted],
        )
