# SPDX-License-Identifier: Apache-2.0
"""Manifests: what videos there are to train on, one row each, as jsonl, csv or json (a list of objects).

    video      the file; paths are relative to the folder of the manifest. An image is a video of one frame.
    audio      the voice, if not the video's own track; "none": there is no sound, and none is expected
    caption    what is to be seen
    reference  an image of the person; without it a frame of the video is drawn
    pose       a video of the same timing that shows how the person moves
    kind       which samples may share a batch, and what they are counted as ("video", of images "image")
    start, end seconds of the video that are used
    regions    parts of the frame by name: a mask (video or image, white inside), or a box [x0, y0, x1, y1] in 0..1
    outside    frames that are not of the clip, by kind: times in seconds, and image files
    id         a name for the row; without it one is made of the path and the times
    fps, frames, width, height   of the file, where they are known: it is then not opened before it is used

In csv a region is a column `regions.NAME` (a box as "x0;y0;x1;y1") and frames are a column `outside.KIND`
("12.5;smile.png"). `ALIASES` are the names that other programs use for the same things.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from talkingdit.data.sample import VIDEO
from talkingdit.errors import UserError
from talkingdit.media.kinds import IMAGES

Box = tuple[float, float, float, float]

# Other names of columns: DiffSynth-Studio, VideoX-Fun and folders of the Hugging Face hub.
ALIASES = {
    "video": ("video_path", "file_path", "file_name", "path"),
    "audio": ("input_audio", "audio_path"),
    "caption": ("prompt", "text"),
    "reference": ("reference_image", "ref_image"),
    "pose": ("s2v_pose_video", "pose_video", "control_file_path"),
    "start": ("start_seconds", "start_time"),
    "end": ("end_seconds", "end_time"),
}
COLUMNS = (
    *("video", "audio", "caption", "reference", "pose", "kind", "start", "end", "regions", "outside"),
    *("id", "fps", "frames", "width", "height"),
)
LONGEST = 1 << 30  # seconds
MOST = {
    "start": LONGEST,
    "end": LONGEST,
    "fps": 1000,
    "frames": 10_000_000,
    "width": 1 << 16,
    "height": 1 << 16,
}  # no video has more
IMAGE = "image"
SILENT = "none"


@dataclass(frozen=True)
class Entry:
    """A row of a manifest."""

    key: str  # unique in the manifest, and the same wherever the row stands
    where: str  # file and line, for messages
    video: Path
    audio: Path | None = None
    silent: bool = False  # no sound is expected
    caption: str = ""
    reference: Path | None = None
    pose: Path | None = None
    kind: str = VIDEO
    start: float = 0.0
    end: float | None = None
    regions: dict[str, Path | Box] = field(default_factory=dict)
    outside: dict[str, tuple[Path | float, ...]] = field(default_factory=dict)
    fps: float | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None

    @property
    def is_image(self) -> bool:
        return self.video.suffix.lower() in IMAGES


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read.

    Args:
        path: the file.
        entries: its rows.
        ignored: names of columns that mean nothing here.
    """

    path: Path
    entries: list[Entry]
    ignored: tuple[str, ...] = ()


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest (.jsonl, .csv or .json). The files that it names are not looked at.

    Raises:
        UserError: no such file, or a row that says something impossible; names file and line.
    """
    source = Path(path)
    rows = _rows(source)
    entries: list[Entry] = []
    seen: dict[str, str] = {}
    ignored: dict[str, None] = {}
    for where, row in rows:
        values, unknown = _values(row, where)
        ignored.update(dict.fromkeys(unknown))
        entry = _entry(values, where, source.parent)
        if entry.key in seen:
            raise UserError(f"{where}: the same id as at {seen[entry.key]} ({entry.key!r}); rows must differ.")
        seen[entry.key] = where
        entries.append(entry)
    if not entries:
        raise UserError(f"{source}: expected at least one video, got an empty manifest.")
    return Manifest(source, entries, tuple(ignored))


def _rows(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and line of every row, and what it says."""
    readers = {".csv": _csv, ".jsonl": _jsonl, ".json": _json}
    if source.suffix.lower() not in readers:
        raise UserError(f"manifest {str(source)!r}: expected a .jsonl, .csv or .json file, got another name.")
    if not os.path.isfile(source):
        raise UserError(f"manifest {str(source)!r}: expected an existing file, got none of this name.")
    try:
        yield from readers[source.suffix.lower()](source)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a text file that can be read ({error}).") from error


def _csv(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{source}:{reader.line_num}"
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or ())
                    got = len([v for k, v in row.items() if k is not None and v is not None]) + len(row.get(None) or ())
                    raise UserError(f"{where}: expected {wanted} columns as in the first line, got {got}.")
                yield where, {name.strip(): value for name, value in row.items()}
        except csv.Error as error:
            raise UserError(f"{source}:{reader.line_num}: not a row of csv ({error}).") from error


def _jsonl(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with source.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{source}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({error}).") from error
            yield where, _object(row, where)


def _json(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(source.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON ({error}).") from error
    if not isinstance(rows, list):
        raise UserError(f"{source}: expected a list of objects, got {type(rows).__name__}.")
    for number, row in enumerate(rows, 1):
        where = f"{source}: item {number}"
        yield where, _object(row, where)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with a video, got {type(row).__name__}.")
    return row


def _values(row: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """What the row says, by our names and without what is empty; and the names that mean nothing."""
    known = {name: name for name in COLUMNS} | {other: name for name in ALIASES for other in ALIASES[name]}
    found: dict[str, Any] = {}
    unknown = []
    for name, value in row.items():
        group, dot, member = name.partition(".")
        if dot and group in ("regions", "outside"):
            if value != "":
                found.setdefault(group, {})[member] = _parts(value)
        elif name not in known:
            unknown.append(name)
        elif value is not None and value != "" and (name in COLUMNS or known[name] not in found):
            # Our own name wins, wherever it stands.
            found[known[name]] = value
    if "video" not in found:
        raise UserError(f"{where}: expected a column 'video' with a file, got none.")
    return found, unknown


def _parts(text: Any) -> Any:
    """Values of a csv cell, separated by semicolons; numbers where they are some."""
    if not isinstance(text, str):
        return text

    def plain(part: str) -> float | str:
        try:
            return float(part)
        except ValueError:
            return part

    parts = [plain(part.strip()) for part in text.split(";")]
    return parts[0] if len(parts) == 1 else parts


def _entry(values: dict[str, Any], where: str, folder: Path) -> Entry:
    texts = ("video", "audio", "caption", "reference", "pose", "kind", "id")
    for name in texts:
        if not isinstance(values.get(name, ""), str):
            raise UserError(f"{where}: {name} must be a text, got {values[name]!r}.")
        _check_text(values.get(name, ""), name, where)
    start = _number(values, "start", where) or 0.0
    end = _number(values, "end", where)
    if end is not None and end <= start:
        raise UserError(f"{where}: end must be behind start ({start:g}), got {end:g}.")
    audio = values.get("audio")
    image = Path(values["video"]).suffix.lower() in IMAGES
    silent = audio == SILENT or image
    fps = _number(values, "fps", where)
    if fps == 0:
        raise UserError(f"{where}: fps must be above 0, got 0.")
    return Entry(
        key=_key(values, where),
        where=where,
        video=folder / values["video"],
        audio=None if audio is None or silent else folder / audio,
        silent=silent,
        caption=values.get("caption", ""),
        reference=folder / values["reference"] if "reference" in values else None,
        pose=folder / values["pose"] if "pose" in values else None,
        kind=values.get("kind", IMAGE if image else VIDEO),
        start=start,
        end=end,
        regions=_regions(values.get("regions", {}), where, folder),
        outside=_outside(values.get("outside", {}), where, folder),
        fps=fps,
        frames=_count(values, "frames", where),
        width=_count(values, "width", where),
        height=_count(values, "height", where),
    )


def _check_text(text: str, name: str, where: str) -> None:
    """Can a text be a name, or be written into one? JSON has halves of characters, too."""
    if "\0" in text:
        raise UserError(f"{where}: {name} must be a text without NUL, got {text!r}.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: {name} must be a text of whole characters, got {text!r}.")


def _number(values: dict[str, Any], name: str, where: str) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{where}: {name} must be a number of at least 0, got {value!r:.80}.")
    if number > MOST.get(name, number):
        raise UserError(f"{where}: {name} must be at most {MOST[name]}, got {value!r}.")
    return number


def _count(values: dict[str, Any], name: str, where: str) -> int | None:
    number = _number(values, name, where)
    if number is not None and (number != int(number) or number < 1):
        raise UserError(f"{where}: {name} must be a whole number of at least 1, got {values[name]!r}.")
    return None if number is None else int(number)


def _key(values: dict[str, Any], where: str) -> str:
    """A name that is good for a file, and differs where path, times or caption do."""
    if "id" in values:
        if not re.fullmatch(r"[\w-]+(/[\w-]+)*", values["id"], re.ASCII):
            raise UserError(f"{where}: id must be letters, digits, '_', '-' and '/', got {values['id']!r}.")
        return values["id"]
    said = [str(values.get(name, "")) for name in ("video", "audio", "start", "end", "caption")]
    digest = hashlib.sha256("\0".join(said).encode()).hexdigest()[:8]
    stem = re.sub(r"\W+", "_", str(Path(values["video"]).with_suffix("")), flags=re.ASCII).strip("_")
    return f"{stem[-60:]}-{digest}"


def _regions(found: Any, where: str, folder: Path) -> dict[str, Path | Box]:
    if not isinstance(found, dict):
        raise UserError(f"{where}: regions must be an object of masks or boxes by name, got {found!r}.")
    regions: dict[str, Path | Box] = {}
    for name, value in found.items():
        _check_text(str(name), "regions", where)
        if isinstance(value, str):
            _check_text(value, f"region {name!r}", where)
            regions[name] = folder / value
            continue
        box = tuple(value) if isinstance(value, list) and all(isinstance(side, int | float) for side in value) else ()
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise UserError(
                f"{where}: region {name!r} must be a file or a box [x0, y0, x1, y1] within 0..1, got {value!r}."
            )
        regions[name] = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    return regions


def _outside(found: Any, where: str, folder: Path) -> dict[str, tuple[Path | float, ...]]:
    if not isinstance(found, dict):
        raise UserError(f"{where}: outside must be an object of times and images by kind, got {found!r}.")
    outside: dict[str, tuple[Path | float, ...]] = {}
    for kind, value in found.items():
        _check_text(str(kind), "outside", where)
        frames: list[Path | float] = []
        for frame in value if isinstance(value, list) else [value]:
            if isinstance(frame, str):
                _check_text(frame, f"outside {kind!r}", where)
                frames.append(folder / frame)
            elif isinstance(frame, int | float) and not isinstance(frame, bool) and 0 <= frame <= LONGEST:
                frames.append(float(frame))
            else:
                raise UserError(f"{where}: outside {kind!r} must be seconds or image files, got {frame!r:.80}.")
        outside[kind] = tuple(frames)
    return outside
