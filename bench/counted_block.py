# SPDX-License-Identifier: Apache-2.0
"""What operators of a 14B step read, write and multiply, counted: ours against the official program's, in bfloat16.

    python -m bench.counted_block        # bench/results/counted-block.json and a table; no GPU, no memory

One block of Wan-S2V-14B with its audio injection runs on tensors without storage. Bytes are those of `bench.traffic`:
every operator reads each argument once and writes each result once. Operations are those of matrix products and
attention, of the library's operators. Norms and attention move what their CUDA kernels do (`counted_step.as_on_gpus`).
What is encoded once for all steps is not counted, on either side. Ours is counted in the ways of `block.MOVING`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import block, record, wan_block
from bench.counted_step import as_on_gpus
from bench.traffic import Traffic

RESULTS = Path(__file__).resolve().parent / "results" / "counted-block.json"
# Operators whose time goes with their operations; all others are bound by memory.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm", "eight_bit_linear", "linear_gelu")


def _eight_bit_operations(codes: Any, scale: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of shapes: codes [M, K] times weight [N, K]."""
    del scale
    return int(2 * codes[0] * codes[1] * weight[0])


def _gelu_operations(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of shapes: x [M, K] times weight [N, K]."""
    return int(2 * x[0] * x[1] * weight[0])


def is_product(operator: str) -> bool:
    """Is an operator, "aten::addmm", a matrix product or attention? Attention to a few audio tokens is not."""
    name = operator.split("::")[1]
    return name in PRODUCTS or ("scaled_dot_product" in name)


def count(shape: wan_block.StepShape) -> dict[str, Any]:
    """By program: bytes, calls by operator, bytes that are bound by memory, and operations."""
    found: dict[str, Any] = {}
    with as_on_gpus():
        functions, tokens = block.contestants(shape, torch.device("cpu"), torch.bfloat16, block.MOVING)
        products = {
            torch.ops.talkingdit.eight_bit_linear: _eight_bit_operations,
            torch.ops.talkingdit.linear_gelu: _gelu_operations,
        }
        for name, (function, dtype) in functions.items():
            x = torch.empty(1, tokens, shape.config["dim"], dtype=dtype)
            with Traffic() as traffic:
                function(x)
            with FlopCounterMode(display=False, custom_mapping=products) as flops:
                function(x)
            moved = traffic.by_operator
            found[name] = {
                "bytes": dict(moved.most_common()),
                "calls": {operator: traffic.calls[operator] for operator, _ in moved.most_common()},
                "memory_bound_bytes": sum(n for operator, n in moved.items() if not is_product(operator)),
                "operations": flops.get_total_flops(),
            }
    return {"shape": shape.name, "tokens": tokens, **found}


def table(entry: dict[str, Any]) -> str:
    """Operators as markdown, in GB and by program, those that move most first."""
    programs = [name for name, value in entry.items() if isinstance(value, dict)]
    names: dict[str, None] = {}
    for program in programs:
        names |= dict.fromkeys(entry[program]["bytes"])
    lines = ["| operator | " + " | ".join(programs) + " |", "|---|" + "---:|" * len(programs)]

    def line(title: str, values: list[float | None], unit: float) -> str:
        return f"| {title} | " + " | ".join("" if v is None else f"{v / unit:.2f}" for v in values) + " |"

    for name in sorted(names, key=lambda name: -max(entry[p]["bytes"].get(name, 0) for p in programs)):
        values = [entry[p]["bytes"].get(name) for p in programs]
        if max(value or 0 for value in values) > 1e8:
            lines.append(line(f"`{name}`", values, 1e9))
    lines.append(line("bound by memory, GB", [entry[p]["memory_bound_bytes"] for p in programs], 1e9))
    lines.append(line("products, TFLOP", [entry[p]["operations"] for p in programs], 1e12))
    return "\n".join(lines)


def main() -> int:
    header = record.header("counted-block", torch.device("cpu"), quick=False)
    entries = [count(shape) for shape in block.SHAPES["cuda"]]
    record.write(RESULTS, json.dumps({**header, "counted": entries}, indent=1) + "\n")
    for entry in entries:
        sys.stdout.write(f"{entry['shape']}\n{table(entry)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
