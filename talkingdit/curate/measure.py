# SPDX-License-Identifier: Apache-2.0
"""Watch a video, once, and note what all stages measure of its clips.

What is wrong with a file ends up in its record and never ends the work. What is written for a video has names that
follow from the video, so that watching it twice, as after a killed worker, changes nothing.
"""

from __future__ import annotations

import copy
import errno
import math
import os
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from talkingdit.atomic import write_whole
from talkingdit.curate.anchors import EXPRESSIONS, Anchors
from talkingdit.curate.look import Look, looks
from talkingdit.curate.settings import USUAL, Watch, Write
from talkingdit.curate.slots import identify_models
from talkingdit.curate.stages import ClipFindings, MeasuringStage, is_alone, make_stages
from talkingdit.curate.versions import ANCHORS, Versions, versions_of
from talkingdit.detect.given import GivenModel
from talkingdit.detect.packages import NotInstalledError
from talkingdit.detect.shots import Cuts
from talkingdit.errors import UserError

FORM = 2  # of records; others are of an earlier version
TODO = "todo"  # in a record on its way to the stages that want a card: those that are to be done
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
        before: its record, where stages that stand alone are all that is missing.
        todo: these stages.
    """

    key: str
    path: Path
    start: float = 0.0
    end: float | None = None
    caption: str = ""
    before: Record | None = None
    todo: tuple[str, ...] = ()


class Watcher:
    """Watches videos; made once per process, for models are loaded here.

    Args:
        watch: settings.
        folder: of the results, where pictures for the report and anchors go.
        write: what is written; anchors are cut out on the way.
        gpu: see `make_stages`.
        given: the weights of slots; those of the settings where it is left out.

    Raises:
        UserError: a stage or model of the settings is not there.
    """

    def __init__(
        self,
        watch: Watch,
        folder: Path,
        write: Write = USUAL,
        gpu: bool | None = None,
        given: Mapping[str, GivenModel] | None = None,
    ) -> None:
        self._watch, self._folder = watch, folder
        given = identify_models(watch) if given is None else given
        self._names = {slot: weights.name for slot, weights in given.items()}
        self._versions = versions_of(watch, given, write)
        self.stages, self.lacking = make_stages(watch, gpu, self._names)
        self._anchors = Anchors(watch, write.head_margin) if write.anchors else None
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
        known = self._known(video.before)
        record = _head(video, self._versions)
        clips: list[dict[str, Any]] = []
        error, lacking = "", self.lacking
        if known:
            assert video.before is not None
            record["stages"] = {**video.before["stages"], **record["stages"]}
            lacking = {n: line for n, line in video.before["lacking"].items() if n not in video.todo} | lacking
        try:
            _check_name(video.path)
            cuts = _cuts(known) if known else None
            for look in looks(video.path, self._watch, video.start, video.end, self._find_cuts, cuts):
                before = known.get(look.number)
                if known and (before is None or abs(before["start"] - look.start) > 1e-3):  # as by another decoder
                    return self.record(replace(video, before=None), keep)
                clips.append(self._clip(video, look, keep) if before is None else self._more(video, look, keep, before))
            if not clips:
                end = "" if video.end is None else f" up to {video.end:g} s"
                error = f"{video.path} has no frames{f' from {video.start:g} s on{end}' if video.start or end else ''}."
        except OSError as found:
            if found.errno in FULL:
                raise
            error = _sentence(video.path, found)
        except Exception as found:  # whatever a decoder or a model raises: one file must not end the work on all others
            error = _sentence(video.path, found)
        record |= {"clips": clips, "error": error, "lacking": lacking}
        if known and keep is not None:
            record[TODO] = video.todo
        return record | {"seconds": round(time.monotonic() - began, 3)}

    def _clip(self, video: Video, look: Look, keep: Keep | None) -> dict[str, Any]:
        found = ClipFindings()
        name = f"{video.key}/{look.number:04d}"
        clip: dict[str, Any] = {
            "number": look.number,
            "shot": look.shot,
            "start": round(look.start, 4),
            "end": round(look.start + look.seconds, 4),
            "figures": {},
            "took": {},
            "of": {},
        }
        if look.seconds < self._watch.min_seconds:
            clip["figures"] = {"clip.seconds": round(look.seconds, 3), "clip.height": look.size[0]}
        else:
            add_figures(clip, *measured(self.stages, look, found))
            if keep is not None:
                keep(look, found)
        clip["found"] = self._keep_found(name, found)
        if zlib.crc32(name.encode()) % 10_000 < self._watch.samples * 10_000:
            clip["sample"] = self._write(f"samples/{name}.jpg", strip(look, found), ".jpg")
        if self._anchors is not None:
            clip["anchors"] = self._anchors_of(name, look, found)
        return clip

    def _known(self, before: Record | None) -> dict[int, dict[str, Any]]:
        """The clips of an earlier record by their numbers; none where what was found in them is no longer there."""
        clips = [] if before is None else before["clips"]
        if all((self._folder / clip["found"]).is_file() for clip in clips):
            return {clip["number"]: clip for clip in clips}
        return {}

    def _more(self, video: Video, look: Look, keep: Keep | None, before: dict[str, Any]) -> dict[str, Any]:
        """A clip that was measured, with figures of the stages that are to be done."""
        clip = copy.deepcopy(before)
        forget(clip, video.todo)
        found = ClipFindings.unpacked((self._folder / clip["found"]).read_bytes())
        name = f"{video.key}/{look.number:04d}"
        if look.seconds >= self._watch.min_seconds:
            stages = {n: stage for n, stage in self.stages.items() if n in video.todo}
            add_figures(clip, *measured(stages, look, found))
            if keep is not None:
                keep(look, found)
            self._keep_found(name, found)
        if self._anchors is not None and ANCHORS in video.todo:
            clip["anchors"] = self._anchors_of(name, look, found)
        return clip

    def _keep_found(self, name: str, found: ClipFindings) -> str:
        file = f"found/{name}.npz"
        (self._folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._folder / file, found.packed())
        return file

    def _anchors_of(self, name: str, look: Look, found: ClipFindings) -> list[dict[str, Any]]:
        assert self._anchors is not None
        signed: dict[str, Any] = {slot: self._names[slot] for slot in ("expression", "verify") if slot in self._names}
        return [
            {
                "kind": kind,
                "at": round(at, 3),
                "file": self._write(f"anchors/{name}-{kind}.png", picture, ".png"),
                **(signed if kind in EXPRESSIONS else {}),
            }
            for kind, at, picture in self._anchors.find(look, found)
        ]

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
    """Figures of a clip by stage, and the processor seconds of each."""
    figures: dict[str, Any] = {}
    took: dict[str, float] = {}
    for name, stage in stages.items():
        began = time.process_time()
        figures[name] = stage.measure(look, found)
        took[name] = round(time.process_time() - began, 4)
    return plain(figures), took


def add_figures(clip: dict[str, Any], figures: dict[str, Any], took: dict[str, float]) -> None:
    """Put what was `measured` into the record of a clip; `of` says which stage gave what, of those that stand alone."""
    for stage, told in figures.items():
        clip["figures"] |= told
        if is_alone(stage):
            clip["of"][stage] = list(told)
    clip["took"] |= took


def forget(clip: dict[str, Any], stages: Collection[str]) -> None:
    """Take what stages have measured out of the record of a clip."""
    for stage in stages:
        for name in clip["of"].pop(stage, []):
            clip["figures"].pop(name, None)
        clip["took"].pop(stage, None)
    if ANCHORS in stages:
        clip["anchors"] = []


def _check_name(path: Path) -> None:
    """Raises UserError: a manifest could not name the file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: its name is no text in UTF-8, as a manifest needs; rename it.") from None


def _cuts(clips: dict[int, dict[str, Any]]) -> list[float]:
    """Seconds at which one shot ends and the next one begins."""
    cuts, shot = [], 0
    for number in sorted(clips):
        cuts += [clips[number]["start"]] * (clips[number]["shot"] - shot)
        shot = clips[number]["shot"]
    return cuts


def _head(video: Video, versions: Versions) -> Record:
    """What a record begins with."""
    told = {"form": FORM, "key": video.key, "watch": versions.base, "stages": dict(versions.stages)}
    return {**told, **stamp_of(video)}


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


def broken_record(video: Video, versions: Versions, error: str) -> Record:
    """The record of a video that could not be watched."""
    return _head(video, versions) | {"clips": [], "error": error, "lacking": {}, "seconds": 0.0}


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
