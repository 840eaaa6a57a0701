# SPDX-License-Identifier: Apache-2.0
"""Watch a video, once, and note what all stages measure of its clips.

What is wrong with a file ends up in its record and never ends the work. What is written for a video has names that
follow from the video, so that watching it twice, as after a killed worker, changes nothing.
"""

from __future__ import annotations

import errno
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from talkingdit.atomic import write_whole
from talkingdit.curate.anchors import Anchors
from talkingdit.curate.look import Look, looks
from talkingdit.curate.settings import Watch
from talkingdit.curate.stages import ClipFindings, MeasuringStage, make_stages
from talkingdit.detect.packages import NotInstalledError
from talkingdit.detect.shots import Cuts
from talkingdit.errors import UserError

FORM = 1  # of records; others are of an earlier version
SAMPLE_PICTURES, SAMPLE_HEIGHT = 4, 108
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Record = dict[str, Any]
Keep = Callable[[Look, ClipFindings], None]


@dataclass(frozen=True)
class Video:
    """A video, or a part of one, to be watched.

    Args:
        key: its name; also of files.
        path: the file, absolute.
        start, end: seconds, of the part.
        caption: if it has one already.
    """

    key: str
    path: Path
    start: float = 0.0
    end: float | None = None
    caption: str = ""


class Watcher:
    """Watches videos; made once per process, for models are loaded here.

    Args:
        watch: settings.
        folder: of the results, where pictures for the report and anchors go.
        anchors: cut out anchors.
        gpu: see `make_stages`.

    Raises:
        UserError: a stage or model of the settings is not there.
    """

    def __init__(self, watch: Watch, folder: Path, anchors: bool = True, gpu: bool | None = None) -> None:
        self._watch, self._folder = watch, folder
        self.stages, self.lacking = make_stages(watch, gpu)
        self._anchors = Anchors(watch) if anchors else None
        self._find_cuts = watch.cut > 0
        try:
            if self._find_cuts:
                Cuts(watch.cut)
        except NotInstalledError as error:
            self._find_cuts = False
            self.lacking["shots"] = str(error)

    def record(self, video: Video, keep: Keep | None = None) -> Record:
        """Everything that is measured of a video, of types that JSON has.

        Args:
            video: to watch.
            keep: given every clip that is measured, and what was found in it.

        Raises:
            OSError: what is written has no place; that is not the video's fault.
        """
        began = time.monotonic()
        record: Record = {"form": FORM, "key": video.key, "watch": self._watch.digest(), **stamp_of(video)}
        clips: list[dict[str, Any]] = []
        error = ""
        try:
            for look in looks(video.path, self._watch, video.start, video.end, self._find_cuts):
                clips.append(self._clip(video, look, keep))
            if not clips:
                error = f"{video.path} has no frames."
        except OSError as found:
            if found.errno in FULL:
                raise
            error = _sentence(video.path, found)
        except Exception as found:  # whatever a decoder or a model raises: one file must not end the work on all others
            error = _sentence(video.path, found)
        record |= {"clips": clips, "error": error, "lacking": self.lacking}
        return record | {"seconds": round(time.monotonic() - began, 3)}

    def _clip(self, video: Video, look: Look, keep: Keep | None) -> dict[str, Any]:
        found = ClipFindings()
        figures: dict[str, Any] = {}
        took: dict[str, float] = {}
        if look.seconds < self._watch.min_seconds:
            figures = {"clip.seconds": round(look.seconds, 3), "clip.height": look.size[0]}
        else:
            figures, took = measured(self.stages, look, found)
            if keep is not None:
                keep(look, found)
        name = f"{video.key}/{look.number:04d}"
        clip: dict[str, Any] = {
            "number": look.number,
            "start": round(look.start, 4),
            "end": round(look.start + look.seconds, 4),
        }
        clip |= {"figures": figures, "took": took}
        if zlib.crc32(name.encode()) % 10_000 < self._watch.samples * 10_000:
            clip["sample"] = self._write(f"samples/{name}.jpg", strip(look, found), ".jpg")
        if self._anchors is not None:
            clip["anchors"] = [
                {"kind": kind, "at": round(at, 3), "file": self._write(f"anchors/{name}-{kind}.png", picture, ".png")}
                for kind, at, picture in self._anchors.find(look, found)
            ]
        return clip

    def _write(self, name: str, picture: Any, kind: str) -> str:
        import cv2

        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 80] if kind == ".jpg" else []
        _, data = cv2.imencode(kind, np.ascontiguousarray(picture[..., ::-1]), quality)
        write_whole(file, data.tobytes())
        return name


def measured(
    stages: dict[str, MeasuringStage], look: Look, found: ClipFindings
) -> tuple[dict[str, Any], dict[str, float]]:
    """Figures of a clip by all stages, and the processor seconds of each."""
    figures: dict[str, Any] = {}
    took: dict[str, float] = {}
    for name, stage in stages.items():
        began = time.process_time()
        figures |= stage.measure(look, found)
        took[name] = round(time.process_time() - began, 4)
    return plain(figures), took


def strip(look: Look, found: ClipFindings) -> Any:
    """Four pictures of a clip in a row, faces in boxes: uint8 [108, W, 3]."""
    import cv2

    row = []
    for at in np.linspace(0, len(look.pictures) - 1, SAMPLE_PICTURES).round().astype(int):
        picture = look.pictures[at].copy()
        for number, person in enumerate(found.people):
            x0, y0, x1, y1 = (round(float(side)) for side in person.boxes[at])
            cv2.rectangle(picture, (x0, y0), (x1, y1), (64, 220, 64) if number == 0 else (240, 180, 40), 2)
        width = max(1, round(picture.shape[1] * SAMPLE_HEIGHT / picture.shape[0]))
        row.append(cv2.resize(picture, (width, SAMPLE_HEIGHT), interpolation=cv2.INTER_AREA))
    return np.concatenate(row, 1)


def stamp_of(video: Video) -> dict[str, Any]:
    """By what it is seen that a file is still the one that was watched."""
    try:
        status = os.stat(video.path)
    except (OSError, ValueError):
        return {"path": str(video.path), "size": 0, "changed": 0, "part": [video.start, video.end]}
    changed = status.st_mtime_ns
    return {"path": str(video.path), "size": status.st_size, "changed": changed, "part": [video.start, video.end]}


def broken_record(video: Video, watch: Watch, error: str) -> Record:
    """The record of a video that could not be watched."""
    record: Record = {"form": FORM, "key": video.key, "watch": watch.digest(), **stamp_of(video)}
    return record | {"clips": [], "error": error, "lacking": {}, "seconds": 0.0}


def _sentence(path: Path, error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    told = text if isinstance(error, UserError) else f"{path}: {type(error).__name__}: {text}"
    return told if told.endswith(".") else told + "."


def plain(value: Any) -> Any:
    """Numbers of Python; what is no number is None."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
