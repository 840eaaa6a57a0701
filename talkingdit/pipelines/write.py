# SPDX-License-Identifier: Apache-2.0
"""The last stage of a video job: the video from its finished clips, with its sound, and a preview."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from talkingdit.encoders.speech import Sound, is_long, pieces
from talkingdit.media.files import SPEECH_RATE, VideoWriter
from talkingdit.media.sheet import COLOURS, FAINT, preview_sheet, sample_frames
from talkingdit.pipelines.inputs import Frames, Inputs, Mark, Outline
from talkingdit.pipelines.resume import ClipStore

SHEET_FRAMES = 20  # at most, on a preview sheet


class PreviewCurves(Protocol):
    """Curves below the frames of a preview, measured while the frames pass."""

    def add(self, frames: Frames) -> None:
        """The next frames [n, H, W, 3]."""

    def curves(self, sound: Sound, fps: int) -> Mapping[str, NDArray[np.float32]]:
        """Name to [frames] values, of all frames that were added and the sound [samples] at 16 kHz."""


def write_video(inputs: Inputs, outline: Outline, store: ClipStore, curves: PreviewCurves | None = None) -> None:
    """Write the video and, if the job asks for one, its preview.

    Raises:
        UserError: a target cannot be written, or a kept clip is damaged.
    """
    job, fps = inputs.job, outline.fps
    wanted = sample_frames(outline.frames, SHEET_FRAMES)
    chosen: list[Frames] = []
    seen = 0
    skip = Fraction(outline.skip, fps)
    with VideoWriter(job.output, fps, outline.size, job.audio, upscale=job.upscale, skip=skip) as writer:
        for number, frames in enumerate(store.frames()):
            if number == 0 and outline.lead:
                frames = np.concatenate([frames[:1].repeat(outline.lead, axis=0), frames])
            writer.write(frames)
            if job.sheet is not None:
                here = wanted[(wanted >= seen) & (wanted < seen + len(frames))]
                chosen.append(frames[here - seen])
                if curves is not None:
                    curves.add(frames)
            seen += len(frames)
    if job.sheet is not None:
        sound: Sound = _Behind(inputs.sound, outline.skip * SPEECH_RATE // fps) if outline.skip else inputs.sound
        sound = sound if len(sound) else np.zeros(1, np.float32)
        waveform, rate = _outline_of(sound)
        preview_sheet(
            marked(np.concatenate(chosen), outline.marks),
            waveform,
            rate,
            fps,
            {} if curves is None else curves.curves(sound, fps),
            job.sheet,
            title=job.output.name,
            times=[(int(i) + 0.5) / fps for i in wanted],
        )


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
