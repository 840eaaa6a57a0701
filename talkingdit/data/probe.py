# SPDX-License-Identifier: Apache-2.0
"""How long and how large files are, found out once and kept in `<manifest>.probe` beside the manifest.

So a sampler knows the shape of every clip without decoding any, and the second start of a run on a large data set takes
no longer than reading one file. A line of that file is good as long as size and time of the file that it is about are
the same; it can be deleted at any time. Lengths are measured: a header is a hint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkingdit.atomic import write_whole
from talkingdit.data.manifest import LONGEST, Entry
from talkingdit.errors import UserError
from talkingdit.media.container import MediaError, MediaFile
from talkingdit.media.image import image_size
from talkingdit.media.kinds import IMAGES
from talkingdit.media.reader import Upright, timed_pictures
from talkingdit.media.timeline import length, timeline

THREADS = 8  # files that are opened at once: most of the time is waiting for a disk
FORM = 2  # of the rows that are kept; others are of an earlier version, where they meant something else
NEARLY = 1e-6  # frames; times in files are rounded


@dataclass(frozen=True)
class Media:
    """What is known of a file.

    Args:
        seconds: of the frames, 0 without any.
        fps: frames per second of the file.
        height, width: upright.
        sound: where its sound ends on the time line of the file, in seconds; 0 without any.
        begins: where the first frame is on the time line, which begins earlier where the sound does.
        error: why it cannot be used, one sentence; the rest means nothing then.
    """

    seconds: float = 0.0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    sound: float = 0.0
    begins: float = 0.0
    error: str = ""


def probe(path: Path) -> Media:
    """Look into a video, image or sound file; never raises for what is wrong with it."""
    if not os.path.isfile(path):
        return Media(error=f"{path} does not exist")
    if path.suffix.lower() in IMAGES:
        return _image(path)
    try:
        with MediaFile(path) as source:
            line, held = timeline(path), length(path)
            sound = float(held.sound)
            if source.pictures is None:
                return Media(sound=sound) if sound else Media(error=f"{path} has neither frames nor sound")
            if line.pictures is None or not held.count:
                return Media(error=f"{path} has no frames")
            _, frame = next(timed_pictures(source))
            height, width = Upright(source.pictures).size(frame)
            seconds = held.pictures - line.pictures
            fps = float(source.pictures.average_rate or source.pictures.base_rate or 25)
            return Media(float(seconds), fps, height, width, sound, float(line.pictures))
    except MediaError as error:
        return Media(error=f"{path} cannot be decoded ({error})")


def _media_from(row: dict[str, Any]) -> Media:
    """What a row says that was kept.

    Raises:
        TypeError, ValueError: it has other fields, or values that no file has.
    """
    media = Media(**row)
    for field in dataclasses.fields(Media):
        value = getattr(media, field.name)
        if field.name == "error":
            fits = isinstance(value, str)
        else:
            fits = type(value) in (int, float) and 0 <= value <= LONGEST
        if not fits:
            raise ValueError(f"{field.name} cannot be {value!r:.80}")
    if media.seconds and not (media.fps and media.height and media.width):
        raise ValueError("pictures without a rate or a size")
    return media


def _image(path: Path) -> Media:
    try:
        height, width = image_size(path)
    except UserError as error:
        return Media(error=f"{path} is not an image ({error})")
    return Media(seconds=1.0, fps=1.0, height=height, width=width)


def frames_of(entry: Entry, video: Media, sound: Media, fps: int) -> int:
    """How many frames of an entry there are at `fps` per second, of those that have a sound where one is expected.

    Frame p is the one nearest to `start` + p / fps seconds.
    """
    if entry.is_image:
        return 1
    last = video.seconds - 0.5 / video.fps  # nearer to nothing than to the last frame
    count = math.ceil((last - entry.start) * fps - NEARLY)
    if entry.end is not None:
        count = min(count, math.ceil((entry.end - entry.start) * fps - NEARLY))
    if not entry.silent and sound.sound:
        # A track that ends half a frame early is as good as whole: encoders cut and fill.
        begins = video.begins if entry.audio is None else 0.0
        count = min(count, math.floor((sound.sound - begins - entry.start) * fps + 0.5))
    return max(count, 0)


class Probes:
    """What the files of a manifest are, from the file beside it where it knows them.

    Args:
        manifest: its path.
    """

    def __init__(self, manifest: Path):
        self.file = manifest.with_name(manifest.name + ".probe")
        self._known: dict[str, dict[str, Any]] = {}
        self._new = False
        with contextlib.suppress(OSError, ValueError, RecursionError):
            for line in self.file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("path"), str):
                    self._known[row.pop("path")] = row

    def of(self, entry: Entry) -> tuple[Media, Media]:
        """Video and sound of an entry; the same where the sound is the video's own."""
        video = self._video(entry)
        return video, video if entry.audio is None or entry.silent else self._media(entry.audio)

    def fill(self, entries: Iterable[Entry]) -> None:
        """Look into all files, several at once, and keep what was found."""
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(self.of, entries):
                pass
        self.save()

    def _video(self, entry: Entry) -> Media:
        own_sound = entry.audio is None and not entry.silent
        if not own_sound and entry.fps and entry.frames and entry.width and entry.height:
            return Media(entry.frames / entry.fps, entry.fps, entry.height, entry.width)
        return self._media(entry.video)

    def _media(self, path: Path) -> Media:
        try:
            status = path.stat()
        except (OSError, ValueError):
            return Media(error=f"{path} does not exist")
        stamp = [FORM, status.st_size, status.st_mtime_ns]
        name = os.path.relpath(path, self.file.parent)
        row = self._known.get(name)
        if row is not None and row.get("stamp") == stamp:
            with contextlib.suppress(TypeError, ValueError):
                return _media_from({key: value for key, value in row.items() if key != "stamp"})
        try:
            media = probe(path)
        except Exception as error:  # whatever a decoder raises: one file must not end the work on all others
            media = Media(error=f"{path} cannot be decoded ({type(error).__name__}: {error})".splitlines()[0])
        self._known[name] = {"stamp": stamp} | dataclasses.asdict(media)
        self._new = True
        return media

    def save(self) -> None:
        """Write the file beside the manifest; a folder that cannot be written to is no reason to stop."""
        if not self._new:
            return
        with contextlib.suppress(OSError):
            lines = [json.dumps({"path": path} | row) + "\n" for path, row in sorted(self._known.items())]
            write_whole(self.file, "".join(lines).encode())
        self._new = False


def media_of(entry: Entry, probes: Probes) -> tuple[Media, Media]:
    """Video and sound of an entry, both good.

    Raises:
        UserError: one of them cannot be used, or has no sound where one is expected.
    """
    video, sound = probes.of(entry)
    for media in (video, sound):
        if media.error:
            raise UserError(f"{media.error}.")
    if not video.seconds:
        raise UserError(f"{entry.video} has no frames.")
    if not entry.silent and not sound.sound:
        file = entry.video if entry.audio is None else entry.audio
        raise UserError(f'{file} has no sound; say so with audio "none" if none is expected.')
    return video, sound
