# SPDX-License-Identifier: Apache-2.0
"""Which clips are kept: figures against limits. Nothing is watched for it, so limits change in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from talkingdit.curate.duplicates import groups
from talkingdit.curate.measure import Record
from talkingdit.curate.settings import CurateSettings, Limit

DUPLICATE = "duplicates.of_another"
LANGUAGE = "language.is_wanted"


@dataclass
class CurateClip:
    """A clip and what became of it.

    Args:
        key: of the clip, "VIDEO/0003".
        video: key of its video.
        path: the file.
        start, end: seconds after its first picture.
        figures: by their names.
        took: processor seconds by stage.
        sample: picture for the report, below the folder.
        anchors: kind, seconds, file.
        failed: names of all limits that it does not keep, in the order of the funnel.
        copy_of: key of the clip that it is the same as.
    """

    key: str
    video: str
    path: Path
    start: float
    end: float
    figures: dict[str, Any]
    took: dict[str, float] = field(default_factory=dict)
    sample: str = ""
    anchors: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    copy_of: str = ""

    @property
    def kept(self) -> bool:
        return not self.failed

    @property
    def removed_by(self) -> str:
        """The first limit of the funnel that it does not keep; "" of clips that are kept."""
        return self.failed[0] if self.failed else ""


@dataclass(frozen=True)
class FunnelStep:
    """A limit of the funnel.

    Args:
        name: of its figure.
        limit: what it asks for.
        came, removed: clips that reached it, and that it removed.
        alone: clips that it would remove if it were the only one.
        unknown: clips without such a figure.
    """

    name: str
    limit: Limit
    came: int
    removed: int
    alone: int
    unknown: int


@dataclass(frozen=True)
class Decisions:
    """All clips, and the funnel."""

    clips: list[CurateClip]
    funnel: list[FunnelStep]

    @property
    def kept(self) -> list[CurateClip]:
        return [clip for clip in self.clips if clip.kept]


def decide(records: Iterable[Record], settings: CurateSettings) -> Decisions:
    """Hold the clips of all videos against the limits."""
    clips = [clip for record in records for clip in _clips(record)]
    wanted = settings.write.wanted_languages
    for clip in clips:
        if wanted and "language.name" in clip.figures:
            clip.figures[LANGUAGE] = int(clip.figures["language.name"] in wanted)
    last = settings.limits.get(DUPLICATE)
    for name, limit in settings.limits.items():
        if name != DUPLICATE:
            for clip in clips:
                if not limit.keeps(_number(clip.figures.get(name))):
                    clip.failed.append(name)
    if last is not None:
        _mark_copies([clip for clip in clips if clip.kept], last)
    return Decisions(clips, _funnel(clips, settings.limits))


def _clips(record: Record) -> list[CurateClip]:
    return [
        CurateClip(
            key=f"{record['key']}/{clip['number']:04d}",
            video=record["key"],
            path=Path(record["path"]),
            start=clip["start"],
            end=clip["end"],
            figures=dict(clip["figures"]),
            took=clip.get("took", {}),
            sample=clip.get("sample", ""),
            anchors=clip.get("anchors", []),
        )
        for clip in record["clips"]
    ]


def _mark_copies(clips: list[CurateClip], limit: Limit) -> None:
    """Of clips that are the same the one with the largest picture is kept, of these the first."""
    best = sorted(clips, key=lambda clip: (-(clip.figures.get("clip.height") or 0), clip.key))
    seconds = [clip.end - clip.start for clip in best]
    pictures, loudness, movement = (
        [clip.figures.get(f"signature.{name}") for clip in best] for name in ("pictures", "loudness", "movement")
    )
    for clip, first in zip(best, groups(pictures, seconds, loudness, movement), strict=True):
        other = best[first]
        clip.figures[DUPLICATE] = int(other is not clip)
        if other is not clip:
            clip.copy_of = other.key
        if not limit.keeps(clip.figures[DUPLICATE]):
            clip.failed.append(DUPLICATE)


def _funnel(clips: list[CurateClip], limits: dict[str, Limit]) -> list[FunnelStep]:
    left, steps = len(clips), []
    for name, limit in [(n, one) for n, one in limits.items() if n != DUPLICATE] + (
        [(DUPLICATE, limits[DUPLICATE])] if DUPLICATE in limits else []
    ):
        removed = sum(clip.removed_by == name for clip in clips)
        alone = sum(name in clip.failed for clip in clips)
        unknown = sum(_number(clip.figures.get(name)) is None for clip in clips)
        steps.append(FunnelStep(name, limit, left, removed, alone, unknown))
        left -= removed
    return steps


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
