# SPDX-License-Identifier: Apache-2.0
"""A talking video from Python: the portrait, the voice and the model that ship with the package, or yours.

    python examples/generate_video.py --output hello.mp4
    python examples/generate_video.py --checkpoint Wan2.2-S2V-14B --image face.jpg --audio speech.wav \\
        --prompt "A woman speaks to the camera" --device cuda --output hello.mp4

The command `talkingdit generate` does the same; --seconds makes a short trial of a long recording.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import soundfile

import talkingdit
from talkingdit.puppets import PORTRAIT, VOICE

PROMPT = "a person with pale skin, bun red hair wearing a black shirt with a white star logo, happy, talking"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=PORTRAIT)
    parser.add_argument("--audio", type=Path, default=VOICE)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--checkpoint", type=Path, help="a folder (default: the model that ships)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=2.0, help="of the recording that are used")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    samples, rate = soundfile.read(args.audio, dtype="float32")
    pipe = talkingdit.TalkingPipeline.from_pretrained(args.checkpoint, device=args.device)
    voice = (samples[: round(args.seconds * rate)], rate)
    out = pipe(args.image, voice, args.prompt, seed=args.seed, output=args.output)
    print(f"{out.path}: {len(out.frames)} frames, made in {out.took:.1f} s")


if __name__ == "__main__":
    main()
