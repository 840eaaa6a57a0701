# SPDX-License-Identifier: Apache-2.0
"""What the papers claim of their parts, measured on the drawn world: a table of ablations, one command, resumable.

    python -m bench.ablations [--only gloria anchors_hold_identity ...] [--minutes 18] [--folder runs/ablations]

A `Study` is a family's: it prepares data, trains a model for each of its rows, and measures its claims. A row is
trained once and may serve several claims. Whatever is finished is kept in the folder: drawn clips, checkpoints of
training, and each measured cell, which also goes into bench/results/ablations.json at once. The same command goes on.

`--quick` goes through all of it in minutes with numbers that mean nothing, for tests; nothing is written to results.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import record

if TYPE_CHECKING:
    from training.config import Config

_ROOT = Path(__file__).resolve().parent.parent
RESULTS = _ROOT / "bench" / "results" / "ablations.json"
# Modules with a `STUDY`.
STUDIES = {
    "gloria": "bench.gloria_rows",
    "gloria_silent": "bench.gloria_silent",
    "skyreels_audio": "bench.skyreels_rows",
    "hunyuan_avatar": "bench.avatar_rows",
}

Measured = Mapping[str, float]  # by name


@dataclass(frozen=True)
class Budget:
    """How much is done.

    The defaults are meant for 6 hours on two cores at most, all studies together: 11 trained rows of 18 minutes are 3.3
    hours, which leaves 2.7 for drawing clips and measuring (each cell says its seconds).

    Args:
        minutes: of training of the first row; the others take as many steps.
        steps: of training of every row, whatever time that takes; 0: by minutes.
        clips: drawn for training.
        video_minutes: of the long videos.
        cases: videos per claim and row.
        seed: of everything.
        threads: of training.
        quick: as little as goes through.
    """

    minutes: float = 18.0
    steps: int = 0
    clips: int = 800
    video_minutes: float = 5.0
    cases: int = 8
    seed: int = 0
    threads: int = 2
    quick: bool = False


@dataclass(frozen=True)
class Row:
    """A model of a study.

    Args:
        name: of the row.
        config: changes of the configuration, by dotted key: {"conditions.anchors.of": "clip"}.
        options: what is said in generation, by name.
        model: the row whose weights it takes; empty: it is trained itself.
        trained: False: it has no model at all; its measures say what they find in right videos.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    trained: bool = True


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Args:
        name: in the table.
        says: the claim, in words.
        rows: names of the rows that are compared, the full model first.
        measure: of a row, its exported model (of a row that trains none: a path where nothing is), and the budget; the
            same cases for each row.
        better: names of measures, with True where more is better.
    """

    name: str
    says: str
    rows: tuple[str, ...]
    measure: Callable[[Row, Path, Budget], Measured]
    better: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """The ablations of a family.

    Args:
        name: of the family, or of more of its claims.
        config: file of training/configs that all rows start from.
        rows, claims: what is trained and measured.
        prepare: writes what training reads into a folder; called again, it goes on.
        settle: says where a row's training finds it; None: a start and clips, by their names in the folder.
    """

    name: str
    config: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    prepare: Callable[[Path, Budget], None]
    settle: Callable[[Config, Row, Path, Budget], None] | None = None

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def study(name: str) -> Study:
    """A study by its name."""
    found: Study = importlib.import_module(STUDIES[name]).STUDY
    return found


def train(chosen: Study, row: Row, folder: Path, budget: Budget) -> Path:
    """The exported model of a row; trained in a process of its own, which goes on where an earlier one was stopped.

    Of a row that trains none it is a path where nothing is.
    """
    if row.model:
        return train(chosen, chosen.row(row.model), folder, budget)
    out = folder / f"{chosen.name}_{row.name}"
    if row.trained and not (out / "model").is_dir():  # which is written whole
        words = ["--train", f"{chosen.name}/{row.name}", "--folder", str(folder), *_words(budget)]
        subprocess.run([sys.executable, "-m", "bench.ablations", *words], check=True, cwd=_ROOT)
    return out / "model"


def _words(budget: Budget) -> list[str]:
    names = [one.name for one in fields(Budget) if one.name != "quick"]
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(budget, name)))]
    return [*words, "--quick"] if budget.quick else words


def run_training(chosen: Study, row: Row, folder: Path, budget: Budget) -> None:
    """Train a row in this process, to the end."""
    from training import parallel
    from training.config import read_toml
    from training.loop import Trainer

    config = read_toml(_ROOT / "training" / "configs" / chosen.config)
    config.run.out = folder / f"{chosen.name}_{row.name}"
    config.run.seed, config.run.threads = budget.seed, budget.threads
    if chosen.settle is not None:
        chosen.settle(config, row, folder, budget)
    else:
        config.model.start = folder / f"{chosen.name}_start"
        for source in config.data.sources.values():
            source.path = folder / f"{chosen.name}_clips"
    config.run.minutes, config.run.steps = 0.0, 2
    if not budget.quick:
        # Rows are compared at equal steps, whatever else the machine did: as many as the first row took in its time.
        first = folder / f"{chosen.name}_{chosen.rows[0].name}" / "log.jsonl"
        if budget.steps:
            config.run.steps = budget.steps
        elif row is chosen.rows[0] or not first.is_file():
            config.run.minutes = budget.minutes
        else:
            config.run.steps = steps_taken(first)
    for key, value in row.config.items():
        change(config, key, value)
    Trainer(config, parallel.start(config.parallel, "cpu")).run()
    parallel.stop()


def steps_taken(log: Path) -> int:
    """Of a finished run, by its log."""
    return max(int(json.loads(line)["step"]) for line in log.read_text().splitlines())


def seconds_taken(log: Path) -> float:
    """Seconds of all steps of a finished run, by its log; those that were taken again count once."""
    logged = {int(entry["step"]): float(entry["speed/seconds_per_step"]) for entry in map(json.loads, log.open())}
    return sum((step - before) * logged[step] for before, step in pairwise([0, *sorted(logged)]))


def change(section: Any, key: str, value: Any) -> None:
    """Set a value within a configuration: `change(config, "conditions.anchors.of", "clip")`; parts may be tables.

    Raises:
        ValueError: there is no such key.
    """
    first, _, rest = key.partition(".")
    table = isinstance(section, dict)
    if not table and not hasattr(section, first):
        raise ValueError(f"ablations: a configuration has no {key!r} in {type(section).__name__}")
    if rest:
        change(section[first] if table else getattr(section, first), rest, value)
    elif table:
        section[first] = value
    else:
        setattr(section, first, value)


@dataclass
class Table:
    """What was measured, kept after each cell."""

    file: Path
    results: Path | None
    own: dict[str, dict[str, Any]] = field(default_factory=dict)  # measured in this folder

    @staticmethod
    def open(folder: Path, results: Path | None) -> Table:
        file = folder / "cells.json"
        return Table(file, results, _cells(file))

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """Those of the results, of other folders too, and the own ones that are not in them."""
        return self.own | (_cells(self.results) if self.results is not None else {})

    def add(self, key: str, cell: dict[str, Any]) -> None:
        """Keep a cell, beside those that other runs have measured meanwhile."""
        with record.adding_to(self.file):
            self.own |= _cells(self.file) | {key: cell}
            record.write(self.file, json.dumps(self.own, indent=1) + "\n")
        if self.results is not None:
            with record.adding_to(self.results):
                record.write(self.results, json.dumps(_cells(self.results) | {key: cell}, indent=1) + "\n")


def _cells(file: Path) -> dict[str, dict[str, Any]]:
    return json.loads(file.read_text()) if file.is_file() else {}


def named(names: Sequence[str]) -> list[tuple[Study, Claim]]:
    """All claims of the studies that are named, or those claims alone; without names all there are.

    Raises:
        ValueError: a name is neither of a study nor of a claim.
    """
    there = [(chosen, claim) for chosen in map(study, STUDIES) for claim in chosen.claims]
    known = [*STUDIES, *(claim.name for _, claim in there)]
    for name in names:
        if name not in known:
            raise ValueError(f"ablations: --only must name studies or claims ({', '.join(known)}), got {name!r}")
    return [(chosen, claim) for chosen, claim in there if not names or chosen.name in names or claim.name in names]


def trained_row(said: str) -> tuple[Study, Row]:
    """The row that "study/row" names.

    Raises:
        ValueError: there is none, or it is not one that is trained itself.
    """
    name, _, row = said.partition("/")
    if name not in STUDIES:
        raise ValueError(f"ablations: --train must be STUDY/ROW with a study of {', '.join(STUDIES)}, got {said!r}")
    chosen = study(name)
    rows = {one.name: one for one in chosen.rows if one.trained and not one.model}
    if row not in rows:
        raise ValueError(f"ablations: --train {name}/ROW must name a row to train ({', '.join(rows)}), got {said!r}")
    return chosen, rows[row]


def check(budget: Budget) -> None:
    """Whether there is anything to do.

    Raises:
        ValueError: a number is too small.
    """
    for one, least in (("steps", 0), ("clips", 1), ("cases", 1), ("seed", 0), ("threads", 1)):
        if getattr(budget, one) < least:
            raise ValueError(f"ablations: --{one} must be at least {least}, got {getattr(budget, one)}")
    for one in ("minutes", "video_minutes"):
        if not 0 < getattr(budget, one) < math.inf:
            option = one.replace("_", "-")
            raise ValueError(f"ablations: --{option} must be a number over 0, got {getattr(budget, one):g}")


def run(names: Sequence[str], folder: Path, budget: Budget, results: Path | None) -> Table:
    """All claims of the studies that are named, or those claims alone; what is measured already stays.

    Raises:
        ValueError: a name is neither of a study nor of a claim.
    """
    wanted = named(names)
    folder.mkdir(parents=True, exist_ok=True)
    table = Table.open(folder, results)
    for chosen, claim in wanted:
        for name in claim.rows:
            key = f"{chosen.name}/{claim.name}/{name}/{budget.seed}"
            said: dict[str, Any] = {"budget": {k: v for k, v in vars(budget).items() if k != "threads"}}
            if table.cells.get(key, {}).get("budget") == said["budget"]:
                continue
            row = chosen.row(name)
            if row.trained:
                chosen.prepare(folder, budget)
            model = train(chosen, row, folder, budget)
            log = model.parent / "log.jsonl"
            said["steps"] = steps_taken(log) if row.trained else None
            said["training"] = (
                {"row": row.model or name, "seconds": round(seconds_taken(log), 1)} if row.trained else None
            )
            began = time.monotonic()
            found = dict(claim.measure(row, model, budget))
            said["seconds"] = round(time.monotonic() - began, 1)
            about = record.header("ablations", torch.device("cpu"), budget.quick)
            said |= {name: about[name] for name in ("machine", "commit")} | {"threads": budget.threads}
            table.add(key, {"measured": found, "says": claim.says, "better": dict(claim.better), **said})
            print(key, json.dumps(found), file=sys.stderr, flush=True)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ablations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="studies or claims (default: all)")
    parser.add_argument("--folder", type=Path, default=_ROOT / "runs" / "ablations", metavar="DIR")
    parser.add_argument("--train", metavar="STUDY/ROW", help="train one row and stop")
    for name, default in vars(Budget()).items():
        if name != "quick":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, metavar="N")
    parser.add_argument("--quick", action="store_true", help="as little as goes through; nothing goes to results")
    options = parser.parse_args(arguments)
    budget = Budget(**{name: getattr(options, name) for name in vars(Budget())})
    if budget.quick:
        budget = Budget(clips=4, video_minutes=0.02, cases=1, seed=budget.seed, quick=True)
    folder = options.folder.resolve()
    try:
        check(budget)
        to_train = None if options.train is None else trained_row(options.train)
        named(options.only)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"ablations: --folder must be a folder, got the file {folder}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if to_train is not None:
        run_training(*to_train, folder, budget)
        return 0
    run(options.only, folder, budget, None if budget.quick else RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
