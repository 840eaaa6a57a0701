# SPDX-License-Identifier: Apache-2.0
"""What is to be judged: systems with their videos, the true videos, texts; matched by the names of files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkingdit.errors import UserError
from talkingdit.media.kinds import VIDEOS

TRUTH = "ground truth"  # the system that true videos are, judged against themselves


@dataclass(frozen=True)
class SpokenText:
    """What is said in a video, and the kind of text it is ("emotions"), for tables by category."""

    words: str
    category: str = ""


@dataclass(frozen=True)
class Pair:
    """One video to judge.

    Attributes:
        system: whose it is.
        name: of the video without its ending, the same for all systems.
        gen, truth: files; truth is None where there is none.
        text: what is said in it.
    """

    system: str
    name: str
    gen: Path
    truth: Path | None
    text: SpokenText


def pairs_of(
    systems: Mapping[str, Path], truth: Path | None, texts: Mapping[str, SpokenText], with_truth: bool = True
) -> list[Pair]:
    """All videos of all systems, by system and name; the true videos come first as a system of their own.

    Args:
        systems: folders of videos, or single videos, by name of the system.
        truth: a folder of videos or a single one, matched by name; a single truth is of every video.
        texts: by name of the video.
        with_truth: judge the true videos as well, which must come out perfect.

    Raises:
        UserError: a folder is missing or has no videos, or a video has no truth.
    """
    true = {} if truth is None else _videos(truth, "--truth")
    out = []
    if with_truth:
        out += [Pair(TRUTH, name, file, file, texts.get(name, SpokenText(""))) for name, file in true.items()]
    for system, folder in systems.items():
        videos = _videos(folder, f"--generated {system}")
        for name, file in videos.items():
            its = next(iter(true.values())) if truth is not None and truth.is_file() else true.get(name)
            if true and its is None:
                near = [other for other in true if other.lower() == name.lower()]
                but = f" (but {near[0]}, whose case differs)" if near else ""
                raise UserError(
                    f"eval: --truth {truth} has no video called {name}{but}, as {file} is; "
                    "expected one for every video."
                )
            out.append(Pair(system, name, file, its, texts.get(name, SpokenText(""))))
    return out


def lacking(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """By system the names of videos that it has not got: of all true ones, or of those of any system without these."""
    names: dict[str, dict[str, None]] = {}
    for pair in pairs:
        names.setdefault(pair.system, {})[pair.name] = None
    wanted = names.get(TRUTH) or dict.fromkeys(name for its in names.values() for name in its)
    if len({pair.truth for pair in pairs}) == 1 and pairs[0].truth is not None:
        return {}  # one truth of every video
    missing = {system: [name for name in wanted if name not in its] for system, its in names.items()}
    return {system: its for system, its in missing.items() if its}


def texts_aside(pairs: Sequence[Pair], texts: Mapping[str, SpokenText]) -> list[str]:
    """What does not fit of the texts: a sentence for videos without one, and for entries without a video."""
    names = dict.fromkeys(pair.name for pair in pairs)
    told = []
    if bare := [name for name in names if name not in texts]:
        told.append(f"{len(bare)} of {len(names)} videos have no text, the first being {bare[0]!r}.")
    if idle := [name for name in texts if name not in names]:
        told.append(f"{len(idle)} of {len(texts)} texts are of no video here, the first being {idle[0]!r}.")
    return told


def _videos(where: Path, flag: str) -> dict[str, Path]:
    if where.is_file():
        return {where.stem: where}
    if not where.is_dir():
        raise UserError(f"eval: {flag}: there is no folder or file {str(where)!r}.")
    found: dict[str, Path] = {}
    for file in sorted(where.iterdir()):
        if file.suffix.lower() in VIDEOS and file.is_file() and not file.name.startswith("."):
            if file.stem in found:
                raise UserError(f"eval: {flag}: {found[file.stem].name} and {file.name} differ in the ending only.")
            found[file.stem] = file
    if not found:
        raise UserError(f"eval: {flag}: expected videos ({', '.join(VIDEOS[:4])}, ...) in {str(where)!r}, found none.")
    return found


def read_texts(path: Path) -> dict[str, SpokenText]:
    """Texts by name of the video, from .jsonl or .csv with the fields name (or video), text, and category or none.

    Raises:
        UserError: the file cannot be read, or a line lacks a field.
    """
    try:
        content = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"eval: --texts {str(path)!r} cannot be read as UTF-8 text ({error}).") from None
    rows: Sequence[Mapping[str, Any]]
    if path.suffix.lower() == ".csv":
        rows = list(csv.DictReader(io.StringIO(content, newline="")))
    else:  # other marks that end lines of text may stand within strings
        rows = [_row(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    out: dict[str, SpokenText] = {}
    for number, row in enumerate(rows, 1):
        where = f"eval: --texts {str(path)!r}, entry {number}"
        name: Any = row.get("name") or row.get("video")
        words: Any = row.get("text")
        category: Any = row.get("category") or ""
        if not name or not all(isinstance(value, str) for value in (name, words, category)):
            raise UserError(f"{where}: expected name and text, got {dict(row)}.")
        name = Path(name).stem if Path(name).suffix.lower() in VIDEOS else name
        if name in out:
            raise UserError(f"{where}: expected one entry for each video, got {name!r} again.")
        out[name] = SpokenText(words, category)
    return out


def _row(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"eval: --texts {str(path)!r}, line {number}: expected a JSON object, got {line[:60]!r}.")
    return row
