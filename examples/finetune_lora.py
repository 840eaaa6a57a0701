# SPDX-License-Identifier: Apache-2.0
"""Adapters (LoRA) for a character, a style or a language, from a folder of videos of people who talk.

    python examples/finetune_lora.py my_videos --checkpoint weights/Wan2.2-S2V-14B --out runs/anna \\
        --prompt "a woman talks to the camera" --steps 2000

The videos have their own sound; a text file beside one (anna.mp4, anna.txt) is its prompt. They are encoded once, then
adapters are trained with the settings of --config; options behind `--` go to the training: `-- --lora.rank 16`. Run
again, everything goes on where it was stopped. On several GPUs start the training by torchrun, see docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VIDEOS = {".mp4", ".mov", ".mkv", ".webm"}


def write_manifest(folder: Path, prompt: str, file: Path) -> int:
    """List the videos of a folder with their prompts; returns how many there are."""
    videos = sorted(path.resolve() for path in folder.iterdir() if path.suffix.lower() in VIDEOS)
    lines = []
    for video in videos:
        beside = video.with_suffix(".txt")
        caption = beside.read_text().strip() if beside.exists() else prompt
        lines.append(json.dumps({"video": str(video), "caption": caption}))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return len(videos)


def run(module: str, *arguments: str | Path) -> None:
    """Run a program of this repository to its end."""
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, check=True)


def main(arguments: list[str] | None = None) -> Path:
    """Returns the file with the adapters."""
    arguments = sys.argv[1:] if arguments is None else arguments
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, help="a folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a released Wan-S2V")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--prompt", default="a person talks to the camera", help="of videos without a text file")
    parser.add_argument("--config", type=Path, default=ROOT / "training" / "configs" / "wan_s2v_lora.toml")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--clip-frames", type=int, default=80, help="frames of a training clip")
    parser.add_argument("--max-area", default="832x448", help="most pixels of a frame")
    args = parser.parse_args(own)
    checkpoint, out = args.checkpoint.resolve(), args.out.resolve()

    if not write_manifest(args.videos, args.prompt, out / "videos.jsonl"):
        parser.error(f"{args.videos}: there is no video in this folder")
    size = ["--clip-frames", args.clip_frames, "--max-area", args.max_area]
    source = ["--manifest", out / "videos.jsonl", "--checkpoint", checkpoint]
    run("talkingdit", "precompute", *source, "--out", out / "data", *size)

    where = ["--run.out", out / "run", "--model.start", checkpoint, "--data.sources.own.path", out / "data"]
    where += ["--conditions.empty-text", out / "data" / "empty_text.safetensors"]
    length = ["--run.steps", args.steps, "--sample.every", 0]
    run("training.train", "--config", args.config.resolve(), *where, *length, *arguments[len(own) + 1 :])

    adapter = out / "run" / "model" / "adapter.safetensors"
    print(f"{adapter}: the adapters; talkingdit.checkpoints.lora.Loras loads them into a model")
    return adapter


if __name__ == "__main__":
    main()
