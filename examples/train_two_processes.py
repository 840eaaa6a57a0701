# SPDX-License-Identifier: Apache-2.0
"""Training on two processes, without a GPU: some steps of the drawn world, weights and samples shared in halves.

    python examples/train_two_processes.py --out runs/two

Prints the command that it starts torchrun with; the same command with another number of processes goes on with the run.
Voice and autoencoder are those that ship with the package. A model that speaks takes more voices and more steps, see
docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from talkingdit.puppets import MODEL, VOICE

ROOT = Path(__file__).resolve().parents[1]


def write_voices(folder: Path) -> Path:
    """A folder of recordings as `training.voices` makes them: here with one alone."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(VOICE, folder)
    entry = {"path": VOICE.name, "speaker": "one", "language": "xx", "split": "train"}
    (folder / "index.jsonl").write_text(json.dumps(entry) + "\n")
    return folder


def main(arguments: list[str] | None = None) -> list[float]:
    """Returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="of each of the two stages")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.processes]
    command += ["-m", "training.train", "--config", "training/configs/puppets_tiny.toml", "--run.out", out / "run"]
    command += ["--run.device", "cpu", "--run.threads", 1, "--parallel.precision", "fp32"]
    command += ["--data.voices", write_voices(out / "voices"), "--data.vae", MODEL / "vae"]
    command += ["--data.cache", out / "data"]
    command += ["--data.long-videos", 1, "--data.short-videos", 1, "--batch.size", 1, "--batch.count", args.processes]
    command += ["--stages.listen.steps", args.steps, "--stages.speak.steps", args.steps]
    words = [str(word) for word in command]
    print(shlex.join(words), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)
    losses = [json.loads(line)["loss"] for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    print(f"loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")
    return losses


if __name__ == "__main__":
    main()
