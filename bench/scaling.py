# SPDX-License-Identifier: Apache-2.0
"""What one GPU of 8 to 512 sends and holds in a training step of Wan-S2V-14B: counted, see `bench.counted_step`.

    python -m bench.scaling [--only WORDS] [--out bench/results/scaling.json]    # counts what the file lacks
    python -m bench.scaling --report docs/scaling.md                            # writes the tables there

A full count takes about a minute per row and no GPU. The file is written after every row, so that a run that was
interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import record, report
from talkingdit import families
from talkingdit.plan import training as planner
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.run import Cluster, MeshSizes, TrainingRun
from talkingdit.plan.transformer import Transformer
from talkingdit.plan.units import UnitSizes, unit_sizes

_RESULTS = Path(__file__).resolve().parent / "results" / "scaling.json"
Case = TypeVar("Case")
GPUS = 8  # per node
NODES = Cluster()  # an H100 node of 8, with 400 Gb/s of network per GPU


@dataclass(frozen=True)
class ScalingCase:
    """A row: sizes of the mesh, frames of a clip of 1024 x 704, and switches.

    Every rank, or group of ranks that share a sequence, has one clip in every micro-batch.
    """

    replicate: int = 1
    shard: int = 1
    ring: int = 1
    ulysses: int = 1
    frames: int = 48
    checkpointing: str = "full"
    optimizer: str = "adamw"
    averages: bool = True
    micro_batches: int = 1  # of every rank, or group of ranks, in a step

    @property
    def mesh(self) -> MeshSizes:
        return MeshSizes(self.replicate, self.shard, self.ring, self.ulysses)

    @property
    def world(self) -> int:
        return self.mesh.data * self.mesh.context

    @property
    def clip(self) -> ClipShape:
        return ClipShape(704, 1024, self.frames // 4, history=19, pose=True)

    @property
    def run(self) -> TrainingRun:
        return TrainingRun(
            self.clip, self.micro_batches * self.mesh.data, self.optimizer, self.checkpointing, self.averages
        )


def cases() -> Iterator[ScalingCase]:
    """Layouts of one node with their switches, then clusters."""
    yield ScalingCase(ulysses=8)
    yield ScalingCase(ulysses=8, frames=80)
    yield ScalingCase(ulysses=8, checkpointing="selective")
    yield ScalingCase(ulysses=8, checkpointing="off")
    yield ScalingCase(ring=2, ulysses=4)
    yield ScalingCase(shard=2, ulysses=4)
    yield ScalingCase(shard=4, ulysses=2)
    yield ScalingCase(shard=8)
    yield ScalingCase(ulysses=8, optimizer="muon")
    yield ScalingCase(ulysses=8, micro_batches=2)
    for nodes in (2, 4, 8, 16, 32, 64):
        yield ScalingCase(shard=nodes, ulysses=8)
        yield ScalingCase(replicate=nodes, ulysses=8)
    for nodes in (2, 8, 64):
        yield ScalingCase(shard=nodes // 2, ring=2, ulysses=8)
    yield ScalingCase(shard=64)
    yield ScalingCase(shard=512)


def transformer() -> Transformer:
    """The released one."""
    return Transformer.of(families.get("wan_s2v"), families.preset("wan_s2v_14b"))


def row(case: ScalingCase) -> dict[str, Any]:
    """Count one case."""
    from bench.counted_step import CountedStep, count  # torch's distributed parts, which the report does not need
    from training.sections import OptimConfig, ParallelConfig

    sizes = {name: getattr(case, name) for name in ("replicate", "shard", "ring", "ulysses")}
    parallel = ParallelConfig(**sizes, activation_checkpointing=case.checkpointing)  # type: ignore[arg-type]
    step = CountedStep(
        *(transformer().config, case.clip, parallel, case.world, GPUS),
        OptimConfig(name=case.optimizer),
        micro_batches=case.micro_batches,
        averages=case.averages,
    )
    counted = count(step)
    return {
        **asdict(case),
        "world": case.world,
        "tokens": transformer().tokens(case.clip)[1],
        "sent": [asdict(sent) for sent in counted.sent],
        "peak": counted.peak,
        "moment": counted.moment,
        "held": counted.held,
    }


def run(path: Path, only: str) -> None:
    """Count the cases that a file lacks, and write it after each."""
    fill("scaling", path, [case for case in cases() if only in str(case)], case_of, row, list(cases()))


def fill(
    name: str,
    path: Path,
    wanted: Iterable[Case],
    case_of: Callable[[Mapping[str, Any]], Case],
    row: Callable[[Case], dict[str, Any]],
    order: Sequence[Case],
) -> None:
    """Add a row for every wanted case that a file of results lacks, and write the file after each.

    Args:
        name: of the results.
        case_of: the case that a row is of.
        row: what is found of a case.
        order: of the rows; those of other cases come last.
    """
    done = [case_of(r) for r in _read(path)["rows"]]
    for case in wanted:
        if case in done:
            continue
        header = record.header(name, torch.device("cpu"), quick=False)
        del header["device"], header["threads"]  # of no device: the README's tables are of files that name one
        counted = row(case)
        with record.adding_to(path):  # another run may have counted others meanwhile
            rows = [r for r in _read(path)["rows"] if case_of(r) != case] + [counted]
            rows.sort(key=lambda r: order.index(case_of(r)) if case_of(r) in order else len(order))
            record.write(path, json.dumps({**header, "rows": rows}, indent=1) + "\n")
        print(case, file=sys.stderr)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {"rows": []}


def case_of(row: Mapping[str, Any]) -> ScalingCase:
    """The case that a row of the file is of."""
    return ScalingCase(**{name: row[name] for name in asdict(ScalingCase()) if name in row})


def _predicted(case: ScalingCase, sizes: dict[str, UnitSizes]) -> planner.TrainPlan:
    if case.optimizer not in sizes:
        sizes[case.optimizer] = unit_sizes(transformer(), case.run)
    cluster = replace(NODES, nodes=-(-case.world // GPUS))
    return planner.predict(transformer(), sizes[case.optimizer], case.run, cluster, case.mesh)


_HEAD = (
    *("GPUs", "replicate x shard x ring x ulysses", "frames", "micro-batches", "checkpointing", "optimiser"),
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "to other nodes", "peak", "predicted"),
    *("computing s", "waiting s", "efficiency"),
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what was counted, in GB, and beside it what `talkingdit plan` predicts of memory and time."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "|".join(["---:", *["---"] * 5, *["---:"] * 10]) + "|"]
    sizes: dict[str, UnitSizes] = {}
    for entry in rows:
        case = case_of(entry)
        plan = _predicted(case, sizes)
        kinds = {kind: sum(sent["bytes"] for sent in entry["sent"] if sent["kind"] == kind) for kind in _HEAD[6:10]}
        computing = plan.seconds["computing"]
        cells = (
            f"{case.world}",
            f"{case.replicate} x {case.shard} x {case.ring} x {case.ulysses}",
            f"{case.frames}",
            f"{case.micro_batches}",
            case.checkpointing,
            case.optimizer,
            *(f"{value / 1e9:.1f}" for value in kinds.values()),
            f"{sum(sent['outside'] for sent in entry['sent']) / 1e9:.1f}",
            f"{sum(entry['peak'].values()) / 1e9:.1f}",
            f"{plan.peak / 1e9:.1f}",
            f"{computing:.2f}",
            f"{plan.step_seconds - computing:.2f}",
            f"{computing / plan.step_seconds:.0%}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_report(results: Path, document: Path) -> None:
    """Put the table between the marks of a document."""
    found = json.loads(results.read_text())
    place = f"Counted with torch {found['versions']['torch']}, commit {found['commit']}; GB per GPU and step."
    report.insert(document, f"{place}\n\n{table(found['rows'])}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="JSON", help="(default: bench/results)")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose description has these words")
    parser.add_argument("--report", type=Path, metavar="MD", help="only write the table into this document")
    options = parser.parse_args(arguments)
    if options.report is not None:
        write_report(options.out, options.report)
    else:
        run(options.out, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
