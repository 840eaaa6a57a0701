# SPDX-License-Identifier: Apache-2.0
"""The first steps of training/configs/puppets.toml: an older build, this one, and this one with a process per core.

    python -m bench.puppet_steps --voices data/voices [--old COMMIT|DIR] [--steps 200] [--turns 4] [--out bench/results]

Builds take turns, which cut their steps into parts of equal length, so that a machine that is slow for a while is slow
for all. All draw the same few videos and encode them with the autoencoder that ships, before the time that counts:
that of the steps, as the run's log has it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.demo import checked_out, name_of

_ROOT = Path(__file__).resolve().parent.parent
_VAE = _ROOT / "talkingdit" / "puppets" / "assets" / "model" / "vae"
# `python -m training.train` in a tree, also where another one is installed to be edited: such finders go before it.
_IN_TREE = """
import runpy, sys
from importlib.machinery import PathFinder
sys.path.insert(0, {tree!r})
sys.meta_path.insert(0, PathFinder)
runpy.run_module("training.train", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Way:
    """How the steps are made.

    Args:
        build: "old" or "new".
        processes: that share the micro-batches of a step.
        threads: of each.
    """

    build: str
    processes: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.build}-{self.processes}"


def ways(builds: Sequence[str], cores: int) -> list[Way]:
    """One process with all cores for every build, and one for each of two cores of this one, where there are two."""
    found = [Way(build, 1, cores) for build in builds]
    return [*found, Way("new", 2, max(1, cores // 2))] if cores > 1 else found


def configuration(voices: Path, folder: Path, way: Way, steps: int) -> str:
    """puppets.toml with so many steps on few videos, kept under `folder`."""
    lines = (_ROOT / "training" / "configs" / "puppets.toml").read_text().splitlines()
    replaced = ("out", "minutes", "voices", "vae", "shipped_vae", "shard", "replicate")
    kept = [line for line in lines if line.partition(" ")[0] not in replaced]
    ours = {
        "[run]": [f'out = "{folder / way.name}"', f"steps = {steps}", f"threads = {way.threads}"],
        "[data]": [
            *(f'voices = "{voices}"', f'vae = "{_VAE}"', f'shipped_vae = "{_VAE}"'),
            *(f'cache = "{folder / way.build}-data"', "long_videos = 2", "short_videos = 4"),
        ],
        # What the file says is for any number of processes, but older builds do not know it.
        "[parallel]": ["shard = 1", f"replicate = {way.processes}"],
    }
    text = [line for one in kept for line in (one, *ours.get(one, []))]
    text = [line for line in text if not line.startswith("every")]
    return "\n".join([*text, "[checkpoint]", "every = 100000", "[log]", "every = 1", "tensorboard = false", ""])


def measure(tree: Path, way: Way, config: Path, log: Path) -> list[float]:
    """Seconds of the steps that a run adds to its log.

    Raises:
        RuntimeError: the process ends with an error.
    """
    before = len(_seconds(log))
    program = config.with_suffix(".py")
    program.write_text(_IN_TREE.format(tree=str(tree)))
    start = [sys.executable]
    if way.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(way.processes)]
    env = {**os.environ, "OMP_NUM_THREADS": str(way.threads), "PYTHONPATH": str(tree)}
    with config.with_suffix(".out").open("w") as said:
        words = [*start, str(program), "--config", str(config)]
        done = subprocess.run(words, cwd=tree, env=env, stdout=said, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{tree}: {config.with_suffix('.out').read_text()[-2000:].strip()}")
    return _seconds(log)[before:]


def _seconds(log: Path) -> list[float]:
    if not log.is_file():
        return []
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [row["speed/seconds_per_step"] for row in rows if "speed/seconds_per_step" in row]


def run(old: str | None, voices: Path, steps: int, turns: int, cores: int) -> list[dict[str, Any]]:
    """Rows of the result: for each way the seconds of its steps, their sum and their median."""
    with checked_out(old) as trees, tempfile.TemporaryDirectory(prefix="talkingdit-steps-") as scratch:
        folder, chosen = Path(scratch), ways(list(trees), cores)
        found: dict[str, list[float]] = {way.name: [] for way in chosen}
        for turn in range(turns):
            for way in chosen:
                config = folder / f"{way.name}.toml"
                config.write_text(configuration(voices, folder, way, steps * (turn + 1) // turns))
                part = measure(trees[way.build], way, config, folder / way.name / "log.jsonl")
                found[way.name] += part
                print(f"{turn + 1}/{turns} {way.name}: {sum(part):.1f} s for {len(part)} steps", flush=True)
    return [
        {
            **asdict(way),
            "seconds": round(sum(found[way.name]), 3),
            "median_step_s": round(statistics.median(found[way.name]), 4),
            "steps_s": [round(one, 4) for one in found[way.name]],
        }
        for way in chosen
    ]


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of every way against the first one."""
    return {
        f"{row['build']}_{row['processes']}_to_{rows[0]['build']}": round(row["seconds"] / rows[0]["seconds"], 3)
        for row in rows[1:]
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.puppet_steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--voices", type=Path, required=True, metavar="DIR", help="made by `python -m training.voices`")
    parser.add_argument("--old", metavar="COMMIT|DIR", help="build to compare with")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of each way (default: 200)")
    parser.add_argument("--turns", type=int, default=4, metavar="N", help="parts of the steps (default: 4)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON file (default: none is written)")
    options = parser.parse_args(arguments)
    if not 1 <= options.turns <= options.steps:
        parser.error(f"--turns must be 1 to the number of steps, got {options.turns} of {options.steps}")
    load, cores = os.getloadavg()[0], torch.get_num_threads()
    rows = run(options.old, options.voices.resolve(), options.steps, options.turns, cores)
    result = record.header("puppet_steps", torch.device("cpu"), quick=options.steps < 100) | {
        "old": name_of(options.old),
        "load_before": round(load, 2),
        "ratios": ratios(rows),
        "ways": rows,
    }
    print(json.dumps({name: result[name] for name in ("ratios", "load_before")}))
    if options.out is not None:
        print(record.save(result, options.out, "cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
