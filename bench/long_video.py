# SPDX-License-Identifier: Apache-2.0
"""A fused step of all windows against the loops of released programs, and memory against the length of a video.

    python -m bench.long_video [--threads 2] [--out bench/results]     steps: time and bytes
    python -m bench.long_video --first                                 the first frame of a live video
    python -m bench.long_video --minutes 1 30                          videos: memory, and who is in their last minute

Steps: guidance of two predictions, an Euler update and the fusion of one denoising step, in float32, as StableAvatar
(sequential blend, window by window) and HunyuanVideo-Avatar (sum and count, windows that wrap around) compute it with
PyTorch, and as `ops.fused_window_step` does. The predictions are there; no model runs. Both are called in turns; the
numbers are medians. Bytes are those that operators read and write (`bench/traffic.py`). Differences to the loop are
stated.

The first frame: with models loaded, seconds until the first frames of a live video are written, beside those of the
denoising of its first clip; medians.

Videos: the model that ships speaks its voice again and again for so many minutes, as a live video in a process of its
own, whose largest resident memory is stated; and the probe reads its first and its last minute: shares of frames with
the portrait's person and logo, and how alike the backgrounds are. Rows are kept in the result as they come, and those
that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from bench import record
from bench.demo import command as demo_command
from bench.traffic import Traffic
from talkingdit import ops
from talkingdit.models import default_checkpoint
from talkingdit.pipelines.plans import OverlapBlend, Plan, ShiftFusion, Windows, blend_curve

GUIDANCE, SIZE, STEP = 4.5, -0.02, 3  # strength, step of the noise level, number of the step
_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "bench" / "results"


@dataclass(frozen=True)
class Scheme:
    """A released program's fusion over latents [channels, length, height, width]."""

    name: str
    plan: Plan
    length: int
    channels: int
    height: int
    width: int


SCHEMES = (
    Scheme("stable_avatar", OverlapBlend(21, 9), 81, 16, 60, 104),
    Scheme("hunyuan_avatar", ShiftFusion(33, 33, 10), 129, 16, 88, 88),
)
QUICK = (
    Scheme("stable_avatar", OverlapBlend(5, 2), 14, 4, 6, 8),
    Scheme("hunyuan_avatar", ShiftFusion(5, 5, 2, cycle=5), 14, 4, 6, 8),
)


# ---- The released loops, as they are written -------------------------------------------------------------------------
def sequential_loop(x: Tensor, given: Tensor, windows: Windows, plan: OverlapBlend) -> Tensor:
    """Window by window: guide, update, blend the head over the last window's tail, write."""
    result, previous = torch.zeros_like(x), x
    curve = blend_curve(plan.overlap, plan.ramp).to(x)[:, None, None]
    for i, start in enumerate(windows.starts):
        slots = windows.slots(i)
        shown = x[:, start : start + slots].clone()
        conditioned, plain = given[0, i, :, :slots], given[1, i, :, :slots]
        new = shown + SIZE * (plain + GUIDANCE * (conditioned - plain))
        if i:
            head = curve * new[:, : plan.overlap] + (1 - curve) * previous[:, -plan.overlap :]
            new[:, : plan.overlap] = head
        result[:, start : start + slots] = new
        previous = new.clone()
    return result


def counted_loop(x: Tensor, given: Tensor, windows: Windows, plan: ShiftFusion) -> Tensor:
    """Window by window: gather with wrapping, guide, update, add to a sum and a count; divide in the end."""
    total = torch.zeros_like(x)
    count = torch.zeros(1, x.shape[1], 1, 1, device=x.device)
    for i, start in enumerate(windows.starts):
        at = (start + torch.arange(windows.frames)) % x.shape[1]
        shown = x[:, at]
        conditioned, plain = given[0, i], given[1, i]
        new = shown + SIZE * (plain + GUIDANCE * (conditioned - plain))
        total.index_add_(1, at, new)
        count.index_add_(1, at, torch.ones_like(new[:1, :, :1, :1]))
    return total / count


def compare(scheme: Scheme, repeats: int) -> dict[str, Any]:
    """Time and bytes of a step, the loop's and ours in turns."""
    windows = scheme.plan.windows(scheme.length, STEP)
    picture = (scheme.height, scheme.width)
    x = torch.randn(scheme.channels, scheme.length, *picture)
    given = torch.randn(2, len(windows.starts), scheme.channels, windows.frames, *picture)
    rates = [1.0, SIZE * GUIDANCE, SIZE * (1 - GUIDANCE)]
    out = torch.empty_like(x)
    loop = sequential_loop if isinstance(scheme.plan, OverlapBlend) else counted_loop
    calls: dict[str, Callable[[], Tensor]] = {
        "loop": lambda: loop(x, given, windows, scheme.plan),  # type: ignore[arg-type]
        "fused": lambda: _fused(x, given, rates, windows, out),
    }
    results = {name: call().clone() for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begin)
    moved = {}
    for name, call in calls.items():
        with Traffic() as traffic:
            call()
        moved[name] = traffic.moved
    medians = {name: statistics.median(times) for name, times in taken.items()}
    difference = (results["fused"] - results["loop"]).double().norm() / results["loop"].double().norm()
    return {
        "scheme": scheme.name,
        "latents": list(x.shape),
        "windows": len(windows.starts),
        "loop_ms": round(1e3 * medians["loop"], 3),
        "fused_ms": round(1e3 * medians["fused"], 3),
        "speedup": round(medians["loop"] / medians["fused"], 2),
        "loop_mb": round(moved["loop"] / 1e6, 3),
        "fused_mb": round(moved["fused"] / 1e6, 3),
        "weights_bytes": windows.weights.nbytes,
        "relative_difference": float(difference),
    }


def _fused(x: Tensor, given: Tensor, rates: list[float], windows: Windows, out: Tensor) -> Tensor:
    return ops.fused_window_step(x, given, rates, windows.starts, windows.weights, out=out)


# ---- The first frame -------------------------------------------------------------------------------------------------
def first_frame(repeats: int) -> dict[str, Any]:
    """Seconds until the first frames of a live video of the model that ships, and of its first clip's denoising."""
    from talkingdit import families
    from talkingdit.families.puppet.options import Options
    from talkingdit.pipelines.inputs import Job, read_inputs
    from talkingdit.pipelines.job import make_video

    family, assets = families.get("puppet"), default_checkpoint().parent
    checkpoint = family.checkpoint.load_checkpoint(default_checkpoint(), torch.float32, "cpu")
    pipeline: Any = family.pipeline.open_pipeline(checkpoint)
    denoise, spent = pipeline._denoise, []

    def timed(*arguments: Any) -> Any:
        begin = time.perf_counter()
        result = denoise(*arguments)
        spent.append(time.perf_counter() - begin)
        return result

    pipeline._denoise = timed
    after, clips = [], []
    with tempfile.TemporaryDirectory(prefix="long-video-") as folder:
        job = Job(
            image=assets / "portrait.png", audio=assets / "voice.flac", output=Path(folder) / "out.mp4", live=True
        )
        inputs = read_inputs(job)
        outline = family.outline.outline(inputs, checkpoint.settings, Options())
        for _ in range(repeats):
            spent.clear()
            after.append(make_video(inputs, outline, pipeline).first_after or 0.0)
            clips.append(spent[0])
    first, clip = statistics.median(after), statistics.median(clips)
    return {"first_frame_s": round(first, 3), "clip_denoising_s": round(clip, 3), "ratio": round(first / clip, 3)}


# ---- Memory, and what stays ------------------------------------------------------------------------------------------
def make_long(minutes: float, steps: int) -> dict[str, Any]:
    """Largest resident memory of a process that makes a live video of so many minutes, and what stays in the video."""
    import soundfile

    assets = default_checkpoint().parent
    voice, rate = soundfile.read(assets / "voice.flac", dtype="float32")
    with tempfile.TemporaryDirectory(prefix="long-video-") as folder:
        sound, made = Path(folder) / "voice.wav", Path(folder) / "out.mp4"
        with soundfile.SoundFile(sound, "w", rate, 1) as file:
            left = round(minutes * 60 * rate)
            while left > 0:
                file.write(voice[:left])
                left -= len(voice)
        command = demo_command(_ROOT)
        command[command.index("--audio") + 1] = str(sound)
        command += ["-o", str(made), "--live", "--steps", str(steps)]
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        seconds = time.monotonic() - begin
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        words = done.stdout.split()
        return {
            "minutes": minutes,
            "steps": steps,
            "frames": int(words[words.index("frames,") - 1]),
            "peak_mib": round(peak, 1),  # of the largest child so far: lengths are made from short to long
            "seconds": round(seconds, 1),
            **dict(zip(("first", "last"), ends(made, assets / "portrait.png"), strict=True)),
        }


def as_drawn(picture: np.ndarray) -> np.ndarray:
    """A picture uint8 [S, S, 3] in the size of the drawn world."""
    from bench.drawn_anchors import SIZE

    return cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_AREA) if picture.shape[0] != SIZE else picture


def ends(video: Path, portrait: Path, seconds: float = 60.0) -> Iterator[dict[str, float]]:
    """What the first and the last seconds of a video have of its portrait.

    Returns:
        twice: shares of frames with the right `identity` and `logo`, and the likeness of the `background` (1: equal).
    """
    from bench.gloria_rows import FPS, backdrop
    from talkingdit.media.image import read_image
    from talkingdit.media.reader import all_pictures
    from talkingdit.puppets.probe import measure_logo, probe

    count = round(seconds * FPS)
    first: list[np.ndarray] = []
    last: deque[np.ndarray] = deque(maxlen=count)
    for picture in (as_drawn(each) for each in all_pictures(video)):
        if len(first) < count:
            first.append(picture)
        last.append(picture)
    given = as_drawn(read_image(portrait))[None]
    who, logo, behind = probe(given).identity[0][0], measure_logo(given)[0], backdrop(given)
    for part in (first, list(last)):
        frames = np.stack(part)
        yield {
            "identity": round(float(np.mean([found == who for found in probe(frames).identity[0]])), 4),
            "logo": round(float(np.mean([found == logo for found in measure_logo(frames)])), 4),
            "background": round(float(1 - np.abs(backdrop(frames) - behind).mean() / 255), 4),
        }


def videos(minutes: Sequence[float], steps: int, path: Path) -> dict[str, Any]:
    """A row for every length, written as it comes; those that are there stay."""
    result: dict[str, Any] = {**record.header("long_video_memory", torch.device("cpu"), quick=False), "videos": []}
    if path.exists():
        result["videos"] = json.loads(path.read_text())["videos"]
    there = {(row["minutes"], row["steps"]) for row in result["videos"]}
    for length in sorted(minutes):
        if (length, steps) not in there:
            made = make_long(length, steps)
            with record.adding_to(path):  # another run may have made others meanwhile
                if path.exists():
                    result["videos"] = json.loads(path.read_text())["videos"]
                result["videos"].append(made)
                record.write(path, json.dumps(result, indent=1) + "\n")
    return result


def run(schemes: Sequence[Scheme], repeats: int, quick: bool) -> dict[str, Any]:
    """All schemes."""
    torch.manual_seed(0)
    rows = [compare(scheme, repeats) for scheme in schemes]
    return {**record.header("long_video", torch.device("cpu"), quick=quick), "steps": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.long_video", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--repeats", type=int, default=30, metavar="N")
    parser.add_argument("--minutes", type=float, nargs="+", metavar="M", help="make videos of these lengths instead")
    parser.add_argument("--first", action="store_true", help="time the first frame of a live video instead")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="denoising steps of the videos")
    parser.add_argument("--out", type=Path, metavar="DIR", default=_RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.minutes:
        path = options.out / "cpu-long_video_memory.json"
        result = videos(options.minutes, options.steps, path)
    elif options.first:
        path = options.out / "cpu-long_video_first.json"
        row = first_frame(min(options.repeats, 5))
        result = {**record.header("long_video_first", torch.device("cpu"), quick=False), "steps": [row]}
        record.write(path, json.dumps(result, indent=1) + "\n")
    else:
        path = options.out / "cpu-long_video.json"
        result = run(SCHEMES, options.repeats, quick=False)
        record.write(path, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result.get("steps", result.get("videos")), indent=1))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
