# SPDX-License-Identifier: Apache-2.0
"""Clips a second and core by stage, and the whole funnel against the same stages as scripts, one after the other.

    python -m bench.curation.speed --voices data/voices --clips 20 --out bench/results/curate-speed.json

Each script reads every video itself, finds for itself what its stage needs (faces for sharpness, text and sync; speech
for voices), and looks for cuts in all pictures, as programs written for one purpose do. All are timed in one process
after each model has been loaded, in processor seconds, which neighbours on the machine change less than the clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.curation.clips import SECONDS, plant, read_voices
from bench.record import header
from talkingdit.atomic import write_whole
from talkingdit.curate.job import CurateJob, curate, find_videos
from talkingdit.curate.local import one_thread
from talkingdit.curate.measure import Video, Watcher
from talkingdit.curate.settings import CurateSettings, Watch, Write
from talkingdit.detect.shots import Cuts
from talkingdit.media.reader import all_pictures

# What a script of one stage has to find before.
NEEDS = {
    "sharpness": ("people", "body"),
    "text": ("people", "body"),
    "body": ("people",),
    "voices": ("speech",),
    "sync": ("people", "speech"),
}
ALONE = ("picture", "people", "body", "sharpness", "motion", "text", "speech", "voices", "sync", "signature")


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Processor and clock seconds."""
    processor, clock = time.process_time(), time.monotonic()
    work()
    return round(time.process_time() - processor, 3), round(time.monotonic() - clock, 3)


def scripts(videos: list[Video], work: Path) -> dict[str, tuple[float, float]]:
    """Each stage as a program of its own."""

    def cuts() -> None:
        for video in videos:
            finder = Cuts(screen=0)
            for picture in all_pictures(video.path):
                finder.add(picture)
            finder.finish()

    spent = {"shots": seconds_of(cuts)}
    for name in ALONE:
        stages = (*NEEDS.get(name, ()), name)
        watcher = Watcher(Watch(stages=stages, cut=0, samples=0), work, write=Write(anchors=False))
        spent[name] = seconds_of(lambda watcher=watcher: [watcher.record(video) for video in videos])  # type: ignore[misc]
    return spent


def funnel(videos: list[Video], work: Path) -> dict[str, Any]:
    """All stages at once, and what each took of it."""
    watcher = Watcher(Watch(stages=ALONE, samples=0), work, write=Write(anchors=False))
    records: list[dict[str, Any]] = []
    processor, clock = seconds_of(lambda: records.extend(watcher.record(video) for video in videos))
    stages: dict[str, float] = {}
    clips = [clip for record in records for clip in record["clips"]]
    for clip in clips:
        for name, seconds in clip["took"].items():
            stages[name] = stages.get(name, 0.0) + seconds
    shared = processor - sum(stages.values())
    return {
        "processor_s": processor,
        "clock_s": clock,
        "clips": len(clips),
        "clips_per_second_per_core": {n: round(len(clips) / s, 2) for n, s in stages.items() if s},
        "decode_and_cuts_s": round(shared, 3),
    }


def ray_seconds(source: Path, work: Path, workers: int) -> float:
    """Clock seconds of the whole command on Ray."""
    folder = work / f"ray-{workers}"
    shutil.rmtree(folder, ignore_errors=True)
    settings = CurateSettings(Watch(stages=ALONE, samples=0))
    began = time.monotonic()
    curate(CurateJob(source, folder, settings, workers, ray="local"), lambda *_: None, lambda _: None)
    return round(time.monotonic() - began, 2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.curation.speed", description=__doc__)
    parser.add_argument("--voices", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--ray", action="store_true", help="also Ray with one and two workers")
    parser.add_argument("--work", type=Path, default=Path("data/curation"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    one_thread()
    torch.set_num_threads(1)
    source = options.work / f"clips-{options.clips}"
    if not (source / "truth.json").is_file():
        plant(source, options.clips, read_voices(options.voices))
    videos = find_videos(source)
    work = options.work / "speed"
    funnel(videos[:1], work)  # loads all models
    whole = funnel(videos, work)
    alone = scripts(videos, work)
    total = round(sum(processor for processor, _ in alone.values()), 3)
    result = {
        **header("curate-speed", torch.device("cpu"), False),
        "clips": len(videos),
        "seconds": SECONDS,
        "funnel": whole,
        "scripts_processor_s": {name: processor for name, (processor, _) in alone.items()},
        "scripts_total_s": total,
        "times_faster": round(total / whole["processor_s"], 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if options.ray:
        result["ray_clock_s"] = {str(workers): ray_seconds(source, options.work, workers) for workers in (1, 2)}
    print(json.dumps(result, indent=1))
    if options.out:
        write_whole(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
