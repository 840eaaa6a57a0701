# SPDX-License-Identifier: Apache-2.0
"""What comes out: a manifest that `talkingdit precompute` and training read, and a table of all clips.

Videos are not copied: a row is the file and the seconds of it. `regions` has boxes of the face, its lower half and the
lips, for models that take masks of faces and for losses that weigh them; `outside` has anchors by kind, from inside and
outside of the clip.
"""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from talkingdit.atomic import whole_file, write_whole
from talkingdit.curate.anchors import EXPRESSIONS, VIEWPOINTS
from talkingdit.curate.decide import CurateClip, Decisions
from talkingdit.curate.measure import Video
from talkingdit.curate.settings import Write

MANIFEST, TABLE = "manifest.jsonl", "clips.parquet"
GLOBALS = 2, 3  # times of the whole scene from inside, and outside of a clip


def write_manifest(folder: Path, decisions: Decisions, videos: list[Video], settings: Write) -> int:
    """Write the clips that are kept; returns how many. The file is there as a whole or not at all."""
    captions = {video.key: video.caption for video in videos}
    together: dict[str, list[CurateClip]] = defaultdict(list)
    for clip in decisions.kept:
        together[clip.video].append(clip)
    rows = [_row(clip, together[clip.video], captions.get(clip.video, ""), folder, settings) for clip in decisions.kept]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(folder / MANIFEST, lines.encode())
    return len(rows)


def _row(clip: CurateClip, others: list[CurateClip], caption: str, folder: Path, settings: Write) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": clip.key,
        "video": os.path.relpath(clip.path, folder.resolve()),
        "start": clip.start,
        "end": clip.end,
    }
    caption = clip.figures.get("caption.text") or caption
    if caption:
        row["caption"] = caption
    regions = _regions(clip, settings.margin)
    if regions:
        row["regions"] = regions
    if settings.anchors:
        outside = _outside(clip, others, settings.anchors_of_a_kind)
        row["outside"] = outside
        row["kind"] = kind_of(outside)
    return row


def _regions(clip: CurateClip, margin: float) -> dict[str, list[float]]:
    """Boxes by the names that the configurations of training know; they hold for all of the clip."""
    box, lips = clip.figures.get("faces.box"), clip.figures.get("faces.mouth")
    regions = {}
    if box:
        x0, y0, x1, y1 = box
        regions = {"face": wider(box, margin), "lower_face": wider([x0, (y0 + y1) / 2, x1, y1], margin)}
    if lips:
        regions["lips"] = wider(lips, margin)
    return {name: one for name, one in regions.items() if one[0] < one[2] and one[1] < one[3]}


def kind_of(outside: dict[str, Any]) -> str:
    """The source of training data that a clip belongs to, by the anchors that it has (Gloria, section 7.2)."""
    views = len([kind for kind in outside if kind in VIEWPOINTS]) > 1
    moods = len([kind for kind in outside if kind in EXPRESSIONS]) > 1
    return {(True, True): "both", (True, False): "viewpoints", (False, True): "expressions"}.get(
        (views, moods), "video"
    )


def _outside(clip: CurateClip, others: list[CurateClip], most: int) -> dict[str, list[Any]]:
    """Anchors by kind. Of a kind those from outside of the clip come first: copied pixels teach nothing."""
    draw = random.Random(clip.key)
    inside = sorted(round(draw.uniform(clip.start, clip.end - 0.1), 3) for _ in range(GLOBALS[0]))
    elsewhere = [other for other in others if other.key != clip.key]
    beyond = []
    for other in draw.sample(elsewhere, min(GLOBALS[1], len(elsewhere))):
        beyond.append(round(draw.uniform(other.start, other.end - 0.1), 3))
    kinds: dict[str, list[Any]] = {"global": sorted(beyond) + inside}
    found: dict[str, list[str]] = defaultdict(list)
    for other in [*draw.sample(elsewhere, len(elsewhere)), clip]:
        for anchor in other.anchors:
            found[anchor["kind"]].append(anchor["file"])
    kinds |= {kind: found[kind][:most] for kind in (*VIEWPOINTS, *EXPRESSIONS) if kind in found}
    return kinds


def wider(box: list[float], margin: float) -> list[float]:
    """A box [x0, y0, x1, y1] in parts of the picture with a margin in its sizes, within the picture."""
    x0, y0, x1, y1 = box
    wide, high = (x1 - x0) * margin, (y1 - y0) * margin
    return [round(min(1.0, max(0.0, side)), 4) for side in (x0 - wide, y0 - high, x1 + wide, y1 + high)]


def write_table(folder: Path, decisions: Decisions) -> Path | None:
    """All clips with their figures and decisions as a Parquet file; None where pyarrow is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return None
    rows = []
    for clip in decisions.clips:
        row: dict[str, Any] = {
            "clip": clip.key,
            "path": str(clip.path),
            "start": clip.start,
            "end": clip.end,
            "kept": clip.kept,
            "removed_by": clip.removed_by,
            "failed": clip.failed,
            "copy_of": clip.copy_of,
        }
        for name, value in clip.figures.items():
            if not name.startswith("signature."):
                row[name] = json.dumps(value) if isinstance(value, list | dict) else value
        rows.append(row)
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    for values in columns.values():  # a column of both kinds of numbers
        if any(isinstance(value, float) for value in values):
            values[:] = [float(value) if isinstance(value, int) else value for value in values]
    with whole_file(folder / TABLE) as temporary:
        pq.write_table(pa.table(columns), temporary)
    return folder / TABLE
