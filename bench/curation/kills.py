# SPDX-License-Identifier: Apache-2.0
"""Kill workers and drivers at many moments; what comes out must be what comes out without.

    python -m bench.curation.kills --kills 20 --workers 2 --out bench/results/curate-kills.json

Videos are drawn small, and stages are those that need no model, so that kills come often. Half of the kills hit a
worker, half the driver, at a moment drawn anew each time. A video that two workers died of counts as broken by design,
so that workers are killed at most once a driver.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.record import header
from talkingdit.atomic import write_whole
from talkingdit.media.files import VideoWriter
from talkingdit.puppets.render import render
from talkingdit.puppets.world import Motion, Scene

SETTINGS = '[watch]\ncut = 0\nstages = ["picture", "motion", "signature"]\n'
FRAMES, FPS, SIDE = 200, 25, 128


def draw_videos(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        scene = Scene.random(rng)
        mouth = np.abs(np.sin(np.linspace(0, 20, FRAMES)))[None].astype(np.float32)
        pictures = render(scene, mouth, np.full_like(mouth, 0.5), [Motion.random(rng, FRAMES, FPS)], SIDE)
        with VideoWriter(folder / f"{number:03d}.mp4", FPS, (SIDE, SIDE)) as video:
            video.write(pictures)


def start(videos: Path, out: Path, settings: Path, how: list[str]) -> subprocess.Popen[bytes]:
    words = ["curate", "--videos", str(videos), "-o", str(out), "--settings", str(settings), *how]
    return subprocess.Popen([sys.executable, "-m", "talkingdit", *words], stderr=subprocess.PIPE)


def children(process: int) -> list[int]:
    """Processes that a process has started and that watch: the ones that use most of the processor."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            line = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"spawn_main" in line:
                found.append(int(child))
    return found


def noted(out: Path) -> dict[str, Any]:
    """Figures by clip, and how often each video is noted."""
    lines = [json.loads(line) for line in (out / "figures.jsonl").read_text().splitlines()]
    figures = {f"{r['key']}/{c['number']}": c["figures"] for r in lines for c in r["clips"]}
    return {
        "videos": sorted(r["key"] for r in lines),
        "figures": figures,
        "errors": [r["error"] for r in lines if r["error"]],
    }


def trial(videos: Path, work: Path, settings: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Kills until so many have hit, each in a run that goes on where the last one was stopped."""
    draw = random.Random(0)
    out = work / "killed"
    hits = {"worker": 0, "driver": 0}
    how = ["--workers", str(options.workers)]
    runs = 0
    while sum(hits.values()) < options.kills:
        if not out.exists() or all_done(out, videos):
            shutil.rmtree(out, ignore_errors=True)
        runs += 1
        process = start(videos, out, settings, how)
        worker = hits["worker"] <= hits["driver"]
        while worker and process.poll() is None and not children(process.pid):
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, options.longest))
        victims = children(process.pid) if process.poll() is None else []
        if worker and victims and killed(draw.choice(victims)):
            hits["worker"] += 1
            time.sleep(draw.uniform(0.0, options.longest))  # it goes on, and may be killed itself
        if process.poll() is None and sum(hits.values()) < options.kills and hits["driver"] < hits["worker"]:
            process.kill()
            hits["driver"] += 1
        process.wait()
    if all_done(out, videos):
        shutil.rmtree(out)
    last = start(videos, out, settings, how)
    _, said = last.communicate()
    if last.returncode:
        raise SystemExit(f"the last run failed: {said.decode()[-300:]}")
    return {"hits": hits, "runs": runs + 1, **noted(out)}


def killed(process: int) -> bool:
    """Kill a process, if it is still there."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def all_done(out: Path, videos: Path) -> bool:
    file = out / "figures.jsonl"
    return file.is_file() and file.read_bytes().count(b"\n") >= len(list(videos.glob("*.mp4")))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.curation.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--longest", type=float, default=4.0, help="seconds until a kill")
    parser.add_argument("--work", type=Path, default=Path("data/curation"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    videos = options.work / f"kills-{options.videos}"
    if len(list(videos.glob("*.mp4"))) < options.videos:
        draw_videos(videos, options.videos)
    settings = options.work / "kills.toml"
    settings.write_text(SETTINGS)
    plain = options.work / "plain"
    shutil.rmtree(plain, ignore_errors=True)
    start(videos, plain, settings, []).communicate()
    shutil.rmtree(options.work / "killed", ignore_errors=True)
    wanted, found = noted(plain), trial(videos, options.work, settings, options)
    same = found["figures"] == wanted["figures"]
    result = {
        "kills": found["hits"],
        "runs": found["runs"],
        "videos": len(wanted["videos"]),
        "lost": len(set(wanted["videos"]) - set(found["videos"])),
        "doubled": len(found["videos"]) - len(set(found["videos"])),
        "broken": len(found["errors"]),
        "same_figures": same,
        "same_manifest": (plain / "manifest.jsonl").read_bytes()
        == (options.work / "killed/manifest.jsonl").read_bytes(),
    }
    print(json.dumps(result))
    if options.out:
        whole = {**header("curate-kills", torch.device("cpu"), False), **result}
        write_whole(options.out, (json.dumps(whole, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
