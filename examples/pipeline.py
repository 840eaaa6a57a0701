# SPDX-License-Identifier: Apache-2.0
"""A pipeline as diffusers users know it: frames as they are made, a callback after every step, and a stop.

    python examples/pipeline.py --output half.mp4

The stop comes in the second clip, so that the file holds the first one. docs/python.md says more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import soundfile

import talkingdit
from talkingdit.puppets import PORTRAIT, VOICE

PROMPT = "a person with pale skin, bun red hair wearing a black shirt with a white star logo, happy, talking"


def main(arguments: list[str] | None = None) -> talkingdit.TalkingOutput:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a folder (default: the model that ships)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args(arguments)
    pipe = talkingdit.TalkingPipeline.from_pretrained(args.checkpoint)
    samples, rate = soundfile.read(VOICE, dtype="float32")
    said: dict[str, Any] = {"image": PORTRAIT, "audio": (samples[: 3 * rate], rate), "prompt": PROMPT}

    for span in pipe.stream(**said, steps=args.steps):
        print(f"{len(span.frames)} frames are there, to be seen from {span.seconds[0]:g} to {span.seconds[1]:g} s")
        break  # who stops looking stops the work

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        print(f"step {step} at {float(timestep):.0f}: latents with a spread of {tensors['latents'].std():.2f}")
        steps.append(step)
        pipe._interrupt = len(steps) > args.steps  # in the second clip
        return tensors

    steps: list[int] = []
    out = pipe(**said, steps=args.steps, callback_on_step_end=watch)
    print(f"{out.save(args.output)}: {len(out.frames)} frames{', stopped early' if out.interrupted else ''}")
    return out


if __name__ == "__main__":
    main()
