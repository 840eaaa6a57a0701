# SPDX-License-Identifier: Apache-2.0
"""`python tools/long_memory.py --minutes 60 [curate eval]`: peak memory for a long video against that for two minutes.

The video is a drawn person and a voice, over and over; each verb runs as a program of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

FPS, SIDE, LOOP = 25, 256, 10  # seconds that are drawn
SHORT = 2.0  # minutes


def draw(path: Path, minutes: float) -> Path:
    """A video of so many minutes."""
    import soundfile

    from talkingdit.media.files import SPEECH_RATE, VideoWriter
    from talkingdit.puppets import VOICE
    from talkingdit.puppets.render import render
    from talkingdit.puppets.visemes import visemes_from_audio
    from talkingdit.puppets.world import Motion, Scene

    voice = np.resize(soundfile.read(VOICE, dtype="float32")[0], LOOP * SPEECH_RATE)
    rng = np.random.default_rng(0)
    shown = visemes_from_audio(voice, FPS, LOOP * FPS)
    pictures = render(
        Scene.random(rng), shown.opening[None], shown.width[None], [Motion.random(rng, LOOP * FPS, FPS)], SIDE
    )
    loops = max(1, round(minutes * 60 / LOOP))
    with VideoWriter(path, FPS, (SIDE, SIDE), np.tile(voice, loops), SPEECH_RATE) as video:
        for _ in range(loops):
            video.write(pictures)
    return path


def peak_of(words: list[str]) -> float:
    """MB that `talkingdit WORDS` held at most; raises SystemExit if it fails."""
    process = subprocess.Popen([sys.executable, "-m", "talkingdit", *words], cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"talkingdit {words[0]} ended with status {process.returncode}")
    return used.ru_maxrss / 1024


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """The figures as a result of this machine and commit."""
    import torch

    from bench import record

    result = {**record.header("long-memory", torch.device("cpu"), quick=False), "rows": rows}
    record.write(path, json.dumps(result, indent=1) + "\n")


def main() -> int:
    """Print a line per verb; the exit status is 1 where the long video takes over a tenth more."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verbs", nargs="*", help="curate, eval (default: both)")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--short", type=float, default=SHORT, help=f"minutes to compare with (default: {SHORT:g})")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where the figures are kept (default: nowhere)")
    parser.add_argument("--metrics", default="ssim,psnr,found,sharpness", help="of eval")
    options = parser.parse_args()
    worse = 0
    with tempfile.TemporaryDirectory() as name:
        peaks: dict[str, list[float]] = {}
        rows: list[dict[str, Any]] = []
        for minutes in (options.short, options.minutes):
            folder = Path(name) / f"{minutes:g}"
            (folder / "videos").mkdir(parents=True)
            video = draw(folder / "videos" / "long.mp4", minutes)
            words = {
                "curate": ["curate", "--videos", str(video.parent), "-o", str(folder / "found")],
                "eval": ["eval", "--generated", str(video), "--truth", str(video), "-o", str(folder / "judged")],
            }
            words["eval"] += ["--metrics", options.metrics, "--regions", "whole,face"]
            for verb in options.verbs or words:
                began = time.monotonic()
                peaks.setdefault(verb, []).append(peak_of(words[verb]))
                row = {"minutes": minutes, "mb": round(peaks[verb][-1]), "seconds": round(time.monotonic() - began)}
                print(f"{verb}: {minutes:g} minutes: {row['mb']} MB, {row['seconds']} s", flush=True)
                rows.append({"verb": verb, **row})
        for verb, (short, long) in peaks.items():
            worse += long > 1.1 * short
            print(
                f"{verb}: {long / short:.2f} times the memory for {options.minutes / options.short:g} times the length"
            )
        if options.out is not None:
            keep(options.out, rows)
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
