# SPDX-License-Identifier: Apache-2.0
"""The step cache on the drawn world: steps computed, time, and what it costs, by threshold.

    python -m bench.step_cache [--clips 4] [--steps 8 20] [--out bench/results]

A held-out character speaks the voice that ships, with the model that ships and its own coefficients. Time is that of
the denoising alone, in turns over the thresholds; PSNR is that of the frames before compression against threshold 0; r
and identity are what the probe reads from the frames (`talkingdit.puppets.measure`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import record
from talkingdit import families
from talkingdit.autoencoders.streaming import to_frames
from talkingdit.encoders.log_mel import normalise_loudness
from talkingdit.families.puppet.options import Options
from talkingdit.families.puppet.outline import Sampling
from talkingdit.media.files import SPEECH_RATE, read_audio
from talkingdit.models import default_checkpoint
from talkingdit.pipelines.long_video import generate_clips
from talkingdit.puppets.measure import HeldOutVoice, MeasureJob, draw_job, measure

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.5)
PROMPT = "a person, talking"
_RESULTS = Path(__file__).resolve().parent / "results"


def job_of(pipeline: Any, clips: int) -> MeasureJob:
    """The voice that ships, as long as so many clips, and a character that nobody trained on."""
    voice = normalise_loudness(read_audio(default_checkpoint().parent / "voice.flac", SPEECH_RATE))
    frames = clips * pipeline.clip_frames
    samples = voice[: frames * SPEECH_RATE // pipeline.settings.fps]
    return draw_job(HeldOutVoice("shipped", "en", samples), frames, pipeline.settings.size, seed=7)


def generate(pipeline: Any, job: MeasureJob, steps: int, threshold: float) -> dict[str, Any]:
    """Frames [n, S, S, 3], seconds of denoising, and steps computed per clip."""
    model, spent, computed = pipeline.checkpoint.transformer, 0.0, 0
    denoise, blocks = pipeline._denoise, model._through_blocks

    def timed(*arguments: Any) -> Any:
        nonlocal spent
        begin = time.perf_counter()
        result = denoise(*arguments)
        spent += time.perf_counter() - begin
        return result

    def counted(*arguments: Any) -> Any:
        nonlocal computed
        computed += 1
        return blocks(*arguments)

    pipeline._denoise, model._through_blocks = timed, counted
    try:
        sampling = Sampling.of(Options(steps=steps, step_cache=threshold), pipeline.settings)
        features, frames = pipeline.features(job.voice.samples)
        conditions = pipeline.conditions(job.portrait, features, PROMPT, sampling, frames=frames)
        clips = -(-frames // pipeline.clip_frames)
        shown = [to_frames(clip.frames) for clip in generate_clips(pipeline, conditions, clips)]
    finally:
        pipeline._denoise, model._through_blocks = denoise, blocks
    return {"frames": np.concatenate(shown), "seconds": spent, "computed": computed / clips}


def psnr(frames: np.ndarray, truth: np.ndarray) -> float | None:
    """In dB of 255; None where they are equal."""
    error = float(np.mean((frames.astype(np.float64) - truth) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else None


def run(clips: int, steps: Sequence[int], repeats: int, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """All thresholds, for each number of steps."""
    family = families.get("puppet")
    pipeline = family.pipeline.open_pipeline(
        family.checkpoint.load_checkpoint(default_checkpoint(), torch.float32, "cpu")
    )
    job = job_of(pipeline, clips)
    result: dict[str, Any] = {**record.header("step_cache", torch.device("cpu"), quick=clips < 2), "steps_of": []}
    for count in steps:
        made = [{t: generate(pipeline, job, count, t) for t in thresholds} for _ in range(repeats)]
        seconds = {t: statistics.median(turn[t]["seconds"] for turn in made) for t in thresholds}
        for threshold in thresholds:
            found = made[0][threshold]
            seen = measure(job, found["frames"])
            row = {
                "steps": count,
                "threshold": threshold,
                "computed": found["computed"],
                "seconds": round(seconds[threshold], 3),
                "time_ratio": round(seconds[threshold] / seconds[0.0], 3),
                "psnr": psnr(found["frames"], made[0][0.0]["frames"]),
                **{name: round(float(seen[name]), 4) for name in ("r", "slope", "identity", "expression")},
            }
            result["steps_of"].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step_cache", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=4, metavar="N")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 20], metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", default=_RESULTS)
    options = parser.parse_args(arguments)
    result = run(options.clips, options.steps, options.repeats)
    path = options.out / "cpu-step_cache.json"
    record.write(path, json.dumps(result, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
