# SPDX-License-Identifier: Apache-2.0
"""Precision and recall of every fault, on drawn clips in which they are planted.

    python -m bench.curation.faults --voices data/voices --clips 200 --out bench/results/curate-faults.json

The same command goes on where it was stopped, also with more clips. Limits were set on clips of other seeds.
A fault is found in a clip if the figure that stands for it is beyond its limit, whatever other limits say. Figures of
which one fault makes another (a clip without a face has no mouth to be in step) count where the fault can be judged.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from bench.curation.clips import SECONDS, Planted, plant, read_voices
from bench.record import header
from talkingdit.atomic import write_whole
from talkingdit.curate.decide import CurateClip, Decisions
from talkingdit.curate.job import CurateJob, curate
from talkingdit.curate.settings import CurateSettings

# The limits that find each fault; a cut is found where a video has two shots.
FINDS = {
    "no_face": ("faces.share",),
    "two_people": ("faces.people",),
    "subtitles": ("text.over_person",),
    "silence": ("speech.share",),
    "shifted": ("sync.lag",),
    "blur": ("sharpness.picture", "sharpness.face"),
    "two_speakers": ("voices.likeness",),
}
CUT_FRAMES = 2  # by which a cut may be misplaced
FPS = 25


def found_in(clips: list[CurateClip]) -> dict[str, bool | None]:
    """Which faults a video has, by the figures of its clips; None where they cannot say."""
    said: dict[str, bool | None] = {}
    for fault, names in FINDS.items():
        known = [clip for clip in clips for name in names if clip.figures.get(name) is not None]
        if fault == "two_people":
            said[fault] = any((clip.figures.get("faces.people") or 0) > 1 for clip in clips)
        elif fault in ("no_face", "silence"):
            said[fault] = any(name in clip.failed for clip in clips for name in names)
        else:
            said[fault] = any(name in clip.failed for clip in clips for name in names) if known else None
    said["cut"] = len({clip.figures.get("clip.shot") for clip in clips}) > 1
    return said


def score(planted: list[Planted], decisions: Decisions) -> dict[str, dict[str, Any]]:
    """Precision and recall of every fault."""
    by_video: dict[str, list[CurateClip]] = {}
    for clip in decisions.clips:
        by_video.setdefault(clip.path.stem, []).append(clip)
    counts = {fault: {"hit": 0, "missed": 0, "false": 0} for fault in (*FINDS, "cut", "duplicate")}
    wrong: list[list[str]] = []
    for one in planted:
        clips = by_video[one.name]
        said = found_in(clips)
        said["duplicate"] = any(clip.copy_of for clip in clips)
        if said["cut"] and one.cut is not None:
            starts = sorted(clip.start for clip in clips)[1:]
            said["cut"] = len(starts) == 1 and abs(starts[0] - one.cut) * FPS <= CUT_FRAMES
        for fault, count in counts.items():
            true, found = one.fault == fault, said[fault]
            if true and not found:
                count["missed"] += 1
            elif true:
                count["hit"] += 1
            elif found and not _follows(one.fault, fault):
                count["false"] += 1
            else:
                continue
            if true != bool(found):
                wrong.append([one.name, one.fault, fault])
    clean = [one for one in planted if one.fault == "none"]
    kept = sum(all(clip.kept for clip in by_video[one.name]) for one in clean)
    table: dict[str, dict[str, Any]] = {fault: {**c, **_rates(c)} for fault, c in counts.items()}
    table["kept"] = {"clean": len(clean), "kept": kept, "wrong": wrong}
    return table


def _follows(planted: str, found: str) -> bool:
    """Faults that others bring with them: of two people one is not in step, and words over a face hide it."""
    return (planted, found) in {
        ("two_people", "shifted"),
        ("blur", "no_face"),
        ("blur", "shifted"),
        ("subtitles", "no_face"),
    }


def _rates(count: dict[str, int]) -> dict[str, float]:
    found, true = count["hit"] + count["false"], count["hit"] + count["missed"]
    return {
        "precision": round(count["hit"] / found, 4) if found else 0.0,
        "recall": round(count["hit"] / true, 4) if true else 0.0,
    }


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """The table of a page."""
    lines = ["| fault | clips | precision | recall |", "|---|---|---|---|"]
    for fault, row in table.items():
        if fault != "kept":
            lines.append(f"| {fault} | {row['hit'] + row['missed']} | {row['precision']:.3f} | {row['recall']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.curation.faults", description=__doc__)
    parser.add_argument("--voices", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("data/curation"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.work / f"faults-{options.seed}"
    began = os.times()
    planted = plant(folder, options.clips, read_voices(options.voices), options.seed)
    job = CurateJob(folder, options.work / f"faults-{options.seed}-found", CurateSettings(), options.workers)
    outcome = curate(job, lambda *_: None, lambda *_: None)
    table = score(planted, outcome.decisions)
    print(markdown(table))
    print(table["kept"])
    ended = os.times()
    spent = sum(ended[:4]) - sum(began[:4])
    print(f"{spent:.0f} processor seconds")
    if options.out:
        result = {
            **header("curate-faults", torch.device("cpu"), False),
            "clips": options.clips,
            "seed": options.seed,
            "seconds": SECONDS,
            "faults": table,
        }
        write_whole(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
