# SPDX-License-Identifier: Apache-2.0
"""Eight-bit layers on the drawn world: whole videos against float32, not ops.

    python -m bench.precision [--videos 8x4x3 50x1x1] [--variants NAME...] [--out bench/results]

Videos are STEPSxCLIPSxCHARACTERS: so many denoising steps, so many clips long, of so many characters.

Held-out characters, with captions that describe them, speak the voice that ships, with the model that ships. PSNR is
that of the frames before compression against float32, r and identity are what the probe reads from the frames
(`talkingdit.puppets.measure`); all are means over the characters, and "worst" is the lowest PSNR. None of them depends
on how busy the machine is. Products are those of the CPU: sums exact or in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench import record
from bench.step_cache import psnr
from talkingdit import families
from talkingdit.autoencoders.streaming import to_frames
from talkingdit.encoders.log_mel import normalise_loudness
from talkingdit.families.puppet.options import Options
from talkingdit.families.puppet.outline import Sampling
from talkingdit.media.files import SPEECH_RATE, read_audio
from talkingdit.models import default_checkpoint
from talkingdit.nn.eight_bit import quantise
from talkingdit.pipelines.long_video import generate_clips
from talkingdit.puppets.measure import HeldOutVoice, MeasureJob, draw_job, measure

_RESULTS = Path(__file__).resolve().parent / "results"
FIRST_CHARACTER = 7  # nobody trained on these
_SEEN = ("r", "slope", "identity", "expression")


class Videos(NamedTuple):
    """Which videos are made."""

    steps: int
    clips: int
    characters: int

    @staticmethod
    def parse(text: str) -> Videos:
        steps, clips, characters = text.split("x")
        return Videos(int(steps), int(clips), int(characters))


class Variant(NamedTuple):
    """How a video is computed."""

    dtype: str
    kind: str | None = None  # "int8" or "fp8"
    contract: str = "exact"

    def __str__(self) -> str:
        return self.dtype if self.kind is None else f"{self.dtype} {self.kind} {self.contract}"


VARIANTS = (
    Variant("float32"),
    Variant("bfloat16"),
    *(Variant("float32", kind) for kind in ("int8", "fp8")),
    *(Variant("bfloat16", kind, contract) for kind in ("int8", "fp8") for contract in ("exact", "close")),
)


def open_pipeline(variant: Variant) -> Any:
    """The shipped model; the autoencoder stays in float32."""
    family = families.get("puppet")
    checkpoint = family.checkpoint.load_checkpoint(default_checkpoint(), torch.float32, "cpu")
    if variant.dtype != "float32":
        narrow = family.checkpoint.load_checkpoint(default_checkpoint(), getattr(torch, variant.dtype), "cpu")
        object.__setattr__(checkpoint, "transformer", narrow.transformer)
    if variant.kind is not None:
        quantise(checkpoint.transformer, family.units.UNITS, variant.kind, variant.contract)
    return family.pipeline.open_pipeline(checkpoint)


def job_of(pipeline: Any, clips: int, character: int) -> MeasureJob:
    """The voice that ships, as long as so many clips, and a character that nobody trained on."""
    voice = normalise_loudness(read_audio(default_checkpoint().parent / "voice.flac", SPEECH_RATE))
    frames = clips * pipeline.clip_frames
    samples = voice[: frames * SPEECH_RATE // pipeline.settings.fps]
    return draw_job(HeldOutVoice("shipped", "en", samples), frames, pipeline.settings.size, seed=character)


def generate(pipeline: Any, job: MeasureJob, steps: int) -> np.ndarray:
    """Frames [n, S, S, 3] uint8."""
    sampling = Sampling.of(Options(steps=steps), pipeline.settings)
    features, frames = pipeline.features(job.voice.samples)
    conditions = pipeline.conditions(job.portrait, features, job.scene.caption(), sampling, frames=frames)
    clips = generate_clips(pipeline, conditions, -(-frames // pipeline.clip_frames))
    return np.concatenate([to_frames(clip.frames) for clip in clips])


def run(
    videos: Sequence[Videos],
    variants: Sequence[Variant] = VARIANTS,
    path: Path | None = None,
) -> dict[str, Any]:
    """Rows of all variants, the first of which is what the others are compared with; written as they come."""
    result: dict[str, Any] = {**record.header("precision", torch.device("cpu"), quick=False), "rows": []}
    for asked in videos:
        truth: dict[int, np.ndarray] = {}
        for variant in variants:
            result["rows"].append(_row(variant, asked, truth))
            print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
            if path is not None:
                record.write(path, json.dumps(result, indent=1) + "\n")
    return result


def _row(variant: Variant, asked: Videos, truth: dict[int, np.ndarray]) -> dict[str, Any]:
    """What videos of a variant are like. The first one's frames are kept in `truth`, by character."""
    pipeline, found, first = open_pipeline(variant), [], not truth
    for character in range(asked.characters):
        job = job_of(pipeline, asked.clips, FIRST_CHARACTER + character)
        frames = generate(pipeline, job, asked.steps)
        if first:
            truth[character] = frames
        found.append({"psnr": psnr(frames, truth[character]), **measure(job, frames)})
    row: dict[str, Any] = {"variant": str(variant), **asked._asdict(), "frames": len(frames) * len(found)}
    if not first:
        row["psnr"] = round(float(np.mean([one["psnr"] for one in found])), 2)
        row["worst"] = round(min(one["psnr"] for one in found), 2)
    return row | {name: round(float(np.mean([one[name] for one in found])), 4) for name in _SEEN}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--videos", type=Videos.parse, nargs="+", default=[Videos(8, 4, 3), Videos(50, 1, 1)], metavar="SxCxN"
    )
    named = {str(variant): variant for variant in VARIANTS}
    parser.add_argument("--variants", nargs="+", choices=named, default=list(named), help="the first is the reference")
    parser.add_argument("--out", type=Path, metavar="DIR", default=_RESULTS)
    options = parser.parse_args(arguments)
    path = options.out / "cpu-precision.json"
    run(options.videos, [named[name] for name in options.variants], path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
