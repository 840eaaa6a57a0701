# SPDX-License-Identifier: Apache-2.0
"""What adapters of Wan-S2V-14B take on one card and its host, in a training step: counted, see `bench.counted_step`.

    python -m bench.one_card [--only WORDS] [--out bench/results/one_card.json]    # counts what the file lacks
    python -m bench.one_card --report docs/memory.md                            # writes the table there

A count takes a minute, half a gigabyte and no GPU. The file is written after every row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import report, scaling
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.run import MeshSizes, TrainingRun
from talkingdit.plan.training_memory import host, memory
from talkingdit.plan.units import unit_sizes

RESULTS = Path(__file__).resolve().parent / "results" / "one_card.json"
MESH = MeshSizes()


@dataclass(frozen=True)
class OneCardCase:
    """A row: a clip of 80 frames with history, and the switches of a run that trains adapters."""

    what: str
    height: int = 448
    width: int = 832
    pose: bool = False
    micro_batches: int = 1
    optimizer: str = "adamw"
    frozen: str = "bf16"
    swap: int = 0
    inputs: str = "host"
    offload: bool = False
    rank: int = 32

    @property
    def run(self) -> TrainingRun:
        """As plans know it, while a step is made: neither a checkpoint is written nor a video made."""
        return TrainingRun(
            ClipShape(self.height, self.width, 20, history=19, pose=self.pose),
            self.micro_batches,
            self.optimizer,
            frozen=self.frozen,
            swap=self.swap,
            inputs=self.inputs,
            offload=self.offload,
            asynchronous=False,
            validates=False,
            trains="lora",
            lora_rank=self.rank,
        )


def cases() -> Iterator[OneCardCase]:
    """What `talkingdit plan --train` proposes for 24 GB, the configuration that ships, and what both replace."""
    eight: dict[str, Any] = {"optimizer": "adamw8bit", "frozen": "int8", "inputs": "host_bf16"}
    yield OneCardCase("float32, all of it offloaded", frozen="float32", inputs="float32", offload=True, pose=True)
    yield OneCardCase("proposed for 24 GB: exact", offload=True)
    yield OneCardCase("proposed for 24 GB and a host of 36 GB", swap=26, **eight)
    shipped = {"height": 528, "width": 704, "pose": True, "micro_batches": 4, "swap": 32}
    yield OneCardCase("`wan_s2v_lora_24gb.toml`", **shipped, **eight)


def row(case: OneCardCase) -> dict[str, Any]:
    """Count one case."""
    from bench.counted_step import CountedStep, count  # torch's distributed parts, which the report does not need
    from training.lora import add_adapters
    from training.sections import LoraConfig, ModelConfig, OptimConfig, ParallelConfig

    run, transformer = case.run, scaling.transformer()
    parallel: Any = {
        "precision": "bf16",
        "activation_checkpointing": run.checkpointing,
        "inputs": run.inputs,
        "offload": run.offload,
    }
    frozen: Any = run.frozen
    counted = count(
        CountedStep(
            *(transformer.config, run.clip, ParallelConfig(**parallel), 1, 1),
            OptimConfig(name=run.optimizer),
            micro_batches=run.micro_batches,
            trains=lambda name: ".lora_" in name,
            prepare=lambda model: add_adapters(model, LoraConfig(rank=run.lora_rank)),
            model=ModelConfig(frozen=frozen, swap=run.swap),
        )
    )
    return {
        **asdict(case),
        "tokens": transformer.tokens(run.clip)[1],
        "peak": counted.peak,
        "moment": counted.moment,
        "held": counted.held,
        "host": counted.host,
    }


def case_of(row: Mapping[str, Any]) -> OneCardCase:
    """The case that a row of the file is of."""
    return OneCardCase(**{name: row[name] for name in asdict(OneCardCase("")) if name in row})


def predicted(case: OneCardCase) -> tuple[float, float]:
    """Bytes on the card and on the host that `talkingdit plan` has for a step of a case."""
    transformer = scaling.transformer()
    sizes = unit_sizes(transformer, case.run)
    on_card, on_host = (part(transformer, sizes, case.run, MESH) for part in (memory, host))
    return sum(on_card.values()), sum(on_host.values())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: GB that were counted on the card and on the host, and beside them what the plan says."""
    lines = ["| a step of | micro-batches | card | planned | host | planned |", "|---|---:|---:|---:|---:|---:|"]
    for entry in rows:
        case = case_of(entry)
        card, beside = predicted(case)
        sizes = (sum(entry["peak"].values()), card, sum(entry["host"].values()), beside)
        lines.append(
            f"| {case.what} | {case.micro_batches} | " + " | ".join(f"{size / 1e9:.1f}" for size in sizes) + " |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.one_card", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="JSON", help="(default: bench/results)")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose description has these words")
    parser.add_argument("--report", type=Path, metavar="MD", help="only write the table into this document")
    options = parser.parse_args(arguments)
    if options.report is not None:
        report.insert(options.report, table(json.loads(options.out.read_text())["rows"]))
    else:
        wanted = [case for case in cases() if options.only in str(case)]
        scaling.fill("one_card", options.out, wanted, case_of, row, list(cases()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
