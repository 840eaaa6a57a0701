# SPDX-License-Identifier: Apache-2.0
"""What was asked for, made with a loaded checkpoint: frames on the disk, a file, or a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.api.asking import CheckedCall
from talkingdit.api.output import TalkingOutput, kept
from talkingdit.api.road import made
from talkingdit.api.spans import FrameSpan, spans
from talkingdit.families import Family
from talkingdit.pipelines.inputs import Frames

if TYPE_CHECKING:
    from talkingdit.pipelines.job import Talk
    from talkingdit.pipelines.write import PreviewCurves


@dataclass(frozen=True)
class Loaded:
    """A checkpoint with its family; `variant` says how its models were changed after loading."""

    family: Family
    checkpoint: Any
    variant: str = ""

    def curves(self) -> PreviewCurves | None:
        return None if self.family.preview is None else self.family.preview.Curves()


def frames_of(loaded: Loaded, asked: CheckedCall, talk: Talk, in_pieces: bool = False) -> Iterator[Frames]:
    """Frames [n, H, W, 3] as they become final, clip by clip or in smaller pieces. An interruption ends them."""
    from talkingdit.pipelines.job import Interrupted, final_frames

    pipeline = loaded.family.pipeline.open_pipeline(loaded.checkpoint)
    try:
        yield from final_frames(asked.inputs, asked.outline, pipeline, talk, in_pieces=in_pieces)
    except Interrupted:
        return


def streamed(loaded: Loaded, asked: CheckedCall, talk: Talk) -> Iterator[FrameSpan]:
    """The same in the smallest pieces, with their sound; nothing of what was asked for stays on the disk."""
    try:
        frames = frames_of(loaded, asked, talk, in_pieces=True)
        yield from spans(frames, asked.inputs, asked.outline)
    finally:
        asked.materials.close()


def collected(loaded: Loaded, asked: CheckedCall, talk: Talk, stopped: Callable[[], bool]) -> TalkingOutput:
    """All frames, on the disk.

    Args:
        stopped: was the work interrupted?
    """
    started = time.monotonic()
    frames = kept(frames_of(loaded, asked, talk), asked.folder, asked.outline.size)
    return _output(loaded, asked, started, lambda: frames, interrupted=stopped())


def written(loaded: Loaded, asked: CheckedCall, talk: Talk) -> TalkingOutput:
    """The file that was asked for. Where the work is interrupted, finished clips are kept beside it."""
    from talkingdit.media.reader import all_pictures
    from talkingdit.pipelines.job import Interrupted
    from talkingdit.pipelines.write import ShownFrames

    started, target, size = time.monotonic(), asked.inputs.job.output, asked.outline.size
    try:
        made(loaded.family, loaded.checkpoint, asked.inputs, asked.outline, talk=talk, variant=loaded.variant)
    except Interrupted as stop:
        talk.say((f"interrupted; {stop.place}.",))
        shown = ShownFrames(asked.inputs, asked.outline)
        frames = kept(map(shown.of, stop.kept()), asked.folder, size)
        return _output(loaded, asked, started, lambda: frames, interrupted=True)

    def read_back() -> Frames:
        return kept((frame[None] for frame in all_pictures(target)), target.parent, size)

    return _output(loaded, asked, started, read_back, path=target)


def _output(
    loaded: Loaded,
    asked: CheckedCall,
    started: float,
    frames: Callable[[], Frames],
    path: Path | None = None,
    interrupted: bool = False,
) -> TalkingOutput:
    return TalkingOutput(
        path=path,
        fps=asked.outline.fps,
        interrupted=interrupted,
        took=time.monotonic() - started,
        _asked=asked,
        _made=frames,
        _curves=loaded.curves,
    )
